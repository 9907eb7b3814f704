"""Bad input is refused before any work: the error names the argument, what was expected and what came."""

import os
import subprocess
import sys

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, linear_sequence_loss, sequence_logps
from copg_kernels.schedules import recompute
from tests.conftest import DEVICE

ON_CPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="values on a GPU are checked by device assertions")


def operands() -> dict:
    return dict(
        hidden_states=torch.randn(8, 4, device=DEVICE),
        lm_head_weight=torch.randn(9, 4, device=DEVICE),
        labels=torch.randint(9, (8,), device=DEVICE),
    )


def batch() -> dict:
    return dict(
        **operands(),
        ref_logps=torch.randn(4, device=DEVICE),
        rewards=torch.randn(4, device=DEVICE),
        beta=0.1,
        group_size=2,
        cu_seqlens=torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32, device=DEVICE),
    )


def integers(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


HEAD_REFUSALS = [
    (dict(hidden_states=[1.0]), TypeError, r"hidden_states must be a tensor, got list"),
    (dict(hidden_states=torch.ones(8, 4, dtype=torch.int64, device=DEVICE)), TypeError, r"hidden_states must be float32.*got int64"),
    (dict(hidden_states=torch.ones(8, device=DEVICE)), ValueError, r"hidden_states must have shape \(\.\.\., H\).*got \(8,\)"),
    (dict(lm_head_weight=torch.ones(9, 4, dtype=torch.float16, device=DEVICE)), TypeError, r"lm_head_weight must be float32, got float16"),
    (dict(lm_head_weight=torch.ones(9, 5, device=DEVICE)), ValueError, r"lm_head_weight must have shape \(V, H\) = \(V, 4\), got \(9, 5\)"),
    (dict(lm_head_weight=torch.ones(9, 4, device="meta")), ValueError, r"lm_head_weight must be on .*, got meta"),
    (dict(labels=torch.zeros(8, device=DEVICE)), TypeError, r"labels must be int64, got float32"),
    (dict(labels=torch.zeros(8, dtype=torch.int32, device=DEVICE)), TypeError, r"labels must be int64, got int32"),
    (dict(labels=torch.zeros(7, dtype=torch.int64, device=DEVICE)), ValueError, r"labels must have the shape .*\(8,\), got \(7,\)"),
    (dict(bias=torch.zeros(8, device=DEVICE)), ValueError, r"bias must have shape \(V,\) = \(9,\), got \(8,\)"),
    (dict(bias=torch.zeros(9, device=DEVICE).double()), TypeError, r"bias must be float32, got float64"),
    (dict(temperature=0.0), ValueError, r"temperature must be positive and finite, got 0\.0"),
    (dict(temperature="hot"), TypeError, r"temperature must be a number, got str"),
    (dict(softcap=-30.0), ValueError, r"softcap must be positive and finite, got -30\.0"),
    (dict(logit_scale=float("nan")), ValueError, r"logit_scale must be a finite number, got nan"),
    (dict(sparse_eps=0.0), ValueError, r"sparse_eps must be a probability in \(0, 1\), got 0\.0"),
    (dict(sparse_eps="small"), TypeError, r"sparse_eps must be a number or None, got str"),
    (dict(workspace_bytes=10), ValueError, r"workspace_bytes must be at least \d+ .*got 10"),
    (dict(workspace_bytes=-1), ValueError, r"workspace_bytes must be at least"),
    (dict(workspace_bytes=1e9), TypeError, r"workspace_bytes must be an int or None, got float"),
    (dict(logit_scale=True), ValueError, r"logit_scale must be a finite number, got True"),
    (dict(ignore_index=-100.0), TypeError, r"ignore_index must be an int, got -100\.0"),
    (dict(ignore_index=None), TypeError, r"ignore_index must be an int, got None"),
    (dict(backend="cuda"), ValueError, r"backend must be \"auto\", \"triton\" or \"torch\", got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", HEAD_REFUSALS, ids=[row[2][:40] for row in HEAD_REFUSALS])
def test_head(change, error, message):
    with pytest.raises(error, match=message):
        linear_logps(**(operands() | change))
    with pytest.raises(error, match=message):
        linear_copg_loss(**(batch() | change))
    with pytest.raises(error, match=message):
        linear_sequence_loss(**(batch() | change), loss=copg_loss)


def test_float64_needs_the_torch_backend():
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in operands().items()}
    with pytest.raises(TypeError, match=r"hidden_states must be .* for backend=\"triton\", got torch\.float64"):
        linear_logps(**inputs, backend="triton")


COMPLETION_REFUSALS = [
    (dict(ref_logps=torch.zeros(3, device=DEVICE)), ValueError, r"ref_logps must have shape \(N,\).* = \(4,\), got \(3,\)"),
    (dict(rewards=torch.zeros(4, 1, device=DEVICE)), ValueError, r"rewards must have shape .*got \(4, 1\)"),
    (dict(rewards=torch.zeros(4, dtype=torch.int64, device=DEVICE)), TypeError, r"rewards must be float32.*got int64"),
    (dict(rewards=[1.0, 0.0, 0.0, 0.0]), TypeError, r"rewards must be a tensor, got list"),
    (dict(average_logps="no"), TypeError, r"average_logps must be a bool, got 'no'"),
    (dict(return_entropy="yes"), TypeError, r"return_entropy must be a bool, got 'yes'"),
    (dict(beta=0.0), ValueError, r"beta must be positive and finite, got 0\.0"),
    (dict(beta=-1), ValueError, r"beta must be positive and finite, got -1"),
    (dict(beta=None), TypeError, r"beta must be a number, got NoneType"),
    (dict(group_size=1), ValueError, r"group_size must be at least 2 .*got 1"),
    (dict(group_size=3), ValueError, r"group_size must divide the number of completions, 4, got 3"),
    (dict(group_size=2.0), TypeError, r"group_size must be an int, got float"),
    (dict(group_size=None), ValueError, r"group_size or cu_groups must be given, and not both.*got neither"),
    (dict(cu_groups=integers(0, 2, 4)), ValueError, r"group_size or cu_groups must be given, and not both.*got both"),
    (dict(group_size=None, cu_groups=integers(0, 2, 4).long()), TypeError, r"cu_groups must be int32, got int64"),
    (dict(group_size=None, cu_groups=integers(0)), ValueError, r"cu_groups must have shape \(N \+ 1,\).*got \(1,\)"),
    (dict(cu_seqlens=integers(0, 2, 4, 6, 8).long()), TypeError, r"cu_seqlens must be int32, got int64"),
    (dict(cu_seqlens=integers(0, 2, 4, 6, 8).view(1, 5)), ValueError, r"cu_seqlens must have shape"),
    (dict(cu_seqlens=None), ValueError, r"labels must have shape \(B, L\), or \(T,\) with cu_seqlens, got \(8,\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, error, message", COMPLETION_REFUSALS, ids=[row[2][:40] for row in COMPLETION_REFUSALS]
)
def test_completions(change, error, message):
    with pytest.raises(error, match=message):
        linear_copg_loss(**(batch() | change))
    with pytest.raises(error, match=message):
        linear_sequence_loss(**(batch() | change), loss=copg_loss)


VALUE_REFUSALS = [
    (dict(labels=torch.tensor([0, 1, 9, 3, 4, 5, 6, 7])), r"labels must lie in \[0, 9\) or be ignore_index = -100, got 9 at index 2"),
    (dict(labels=torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])), r"labels must lie in .*got -1 at index 7"),
    (dict(rewards=torch.tensor([0, float("nan"), 0, 0])), r"rewards must be finite, got nan at index 1"),
    (dict(ref_logps=torch.tensor([0, 0, 0, float("-inf")])), r"ref_logps must be finite, got -inf at index 3"),
    (dict(cu_seqlens=integers(1, 2, 4, 6, 8)), r"cu_seqlens must start at 0, got \[1, 2, 4, 6, 8\]"),
    (dict(cu_seqlens=integers(0, 4, 2, 6, 8)), r"cu_seqlens must not decrease, got \[0, 4, 2, 6, 8\]"),
    (dict(cu_seqlens=integers(0, 2, 4, 6, 7)), r"cu_seqlens must end at 8, got"),
    (dict(group_size=None, cu_groups=integers(0, 1, 4)), r"cu_groups must leave at least 2 completions in every group, got \[0, 1, 4\]"),
    (dict(group_size=None, cu_groups=integers(0, 3, 4)), r"cu_groups must leave at least 2"),
    (dict(group_size=None, cu_groups=integers(0, 2, 3)), r"cu_groups must end at 4"),
]  # fmt: skip


@ON_CPU
@pytest.mark.parametrize("change, message", VALUE_REFUSALS, ids=[row[1][:40] for row in VALUE_REFUSALS])
def test_values(change, message):
    with pytest.raises(ValueError, match=message):
        linear_copg_loss(**(batch() | change))
    with pytest.raises(ValueError, match=message):
        linear_sequence_loss(**(batch() | change), loss=copg_loss)


@ON_CPU
@pytest.mark.parametrize("average_logps", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("function", [linear_copg_loss, lambda **kw: linear_sequence_loss(**kw, loss=copg_loss)])
def test_an_empty_completion(function, average_logps):
    empty = batch() | dict(cu_seqlens=integers(0, 2, 2, 6, 8), average_logps=average_logps)
    with pytest.raises(ValueError, match=r"labels must leave every completion a counted token, completion 1 has none"):
        function(**empty)
    ignored = batch() | dict(average_logps=average_logps)
    ignored["labels"][6:] = -100
    with pytest.raises(ValueError, match=r"completion 3 has none"):
        function(**ignored)


@pytest.mark.parametrize("loss", ["dpo", None, torch.zeros(())], ids=["name", "nothing", "tensor"])
def test_a_loss_that_is_no_function(loss):
    with pytest.raises(TypeError, match=r"loss must be a function, such as copg_kernels\.losses\.dpo_loss, got"):
        linear_sequence_loss(**batch(), loss=loss)


def test_average_is_a_flag():
    token_logps, labels = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    for average in ("no", 1, None):
        with pytest.raises(TypeError, match=f"average must be a bool, got {average!r}"):
            sequence_logps(token_logps, labels, average=average)


def test_sequence_logps():
    token_logps, labels = torch.zeros(8, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match=r"per_token_logps must be float32 or float64, got float16"):
        sequence_logps(token_logps.half(), labels, cu_seqlens=integers(0, 8))
    with pytest.raises(ValueError, match=r"labels must have shape of per_token_logps = \(8,\), got \(7,\)"):
        sequence_logps(token_logps, labels[1:], cu_seqlens=integers(0, 8))
    with pytest.raises(ValueError, match=r"labels must have shape \(B, L\), or \(T,\) with cu_seqlens"):
        sequence_logps(token_logps, labels)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"cu_seqlens must end at 8, got \[0, 7\]"):
            sequence_logps(token_logps, labels, cu_seqlens=integers(0, 7))


def test_copg_loss():
    numbers = [torch.randn(4, device=DEVICE) for _ in range(3)]
    with pytest.raises(TypeError, match=r"logps must be float32.*got int64"):
        copg_loss(numbers[0].long(), *numbers[1:], beta=0.1, group_size=2)
    with pytest.raises(ValueError, match=r"logps must have shape \(N,\), got \(2, 2\)"):
        copg_loss(numbers[0].view(2, 2), *numbers[1:], beta=0.1, group_size=2)
    with pytest.raises(ValueError, match=r"group_size must divide"):
        copg_loss(*numbers, beta=0.1, group_size=3)


def test_out_of_memory_names_the_workspace(monkeypatch, backend):
    """And leaves no partial gradients."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    inputs = operands()
    inputs["lm_head_weight"].requires_grad_()
    logps = linear_logps(**inputs, workspace_bytes=2**20, backend=backend)
    monkeypatch.setattr(recompute, "addmm_fp32_", full)
    monkeypatch.setattr(recompute, "mm_fp32", full)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"workspace_bytes=1048576; set a smaller one\. CUDA out of memory"
    ):
        logps.sum().backward()
    assert inputs["lm_head_weight"].grad is None


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=300
    )


CALL = """
import torch
from copg_kernels import linear_logps
x, w, y = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
print(linear_logps(x, w, y))
linear_logps(x, w, y, backend="triton")
"""


def test_triton_on_cpu_tensors_is_refused_and_auto_still_works():
    result = run_python(CALL)
    assert "-1.0986" in result.stdout
    assert 'ValueError: backend="triton" needs CUDA tensors, got hidden_states on cpu' in result.stderr


def test_without_triton_the_torch_backend_works():
    """macOS and Windows have no Triton: importing it fails there."""
    result = run_python("import sys; sys.modules['triton'] = None\n" + CALL)
    assert "-1.0986" in result.stdout
    assert 'ValueError: backend="triton" needs the triton package' in result.stderr


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_device_assertion_on_a_bad_label():
    code = CALL.replace("torch.zeros(2, dtype=torch.int64)", "torch.full((2,), 7)").replace(
        "x, w, y =", "torch.set_default_device('cuda'); x, w, y ="
    )
    result = run_python(code)
    assert result.returncode != 0 and "labels must lie in [0, 3)" in result.stdout + result.stderr

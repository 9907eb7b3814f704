"""linear_logps against float64: values, gradients, awkward shapes and operands, on every backend."""

import pytest
import torch

from copg_kernels import linear_logps
from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.reference import linear_logps_ref
from copg_kernels.schedules import frozen_head
from tests.conftest import DEVICE, KERNEL_DTYPES
from tests.numerics import assert_close, assert_logps_close, relative_error, upcast

# One tile is 16 x 32 in the interpreter and at most 256 x 128 on a GPU.
INTERPRETED_TILES = [(16, 32, 64), (17, 33, 64), (15, 31, 64), (48, 128, 96)]
GPU_TILES = [(256, 128, 64), (257, 129, 64), (255, 127, 72), (640, 8192, 512)]
SHAPES = [(1, 2, 16), (37, 301, 70), (5, 307, 33), (3, 1, 16)] + (
    GPU_TILES if DEVICE.type == "cuda" else INTERPRETED_TILES
)
EVERY_OPTION = dict(bias=True, logit_scale=0.8, softcap=6.0, temperature=1.25)
OPTIONS = [
    {},
    *({name: value} for name, value in EVERY_OPTION.items()),
    EVERY_OPTION,
]


def make_inputs(T, V, H, dtype=torch.float32, *, bias=False, spread=3.0, ignored=True) -> dict:
    """Random operands with some confident rows and some ignored ones."""
    weight = torch.randn(V, H) * (spread / H**0.5)
    hidden_states = torch.randn(T, H)
    labels = torch.randint(V, (T,))
    # Hidden states along their label's row make confident tokens; without them every probability is about 1 / V.
    confident = torch.arange(0, T, 4)
    hidden_states[confident] += 8 * weight[labels[confident]] / weight[labels[confident]].norm(dim=1, keepdim=True)
    if ignored:
        labels[2::5] = -100
    inputs = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels)
    if bias:
        inputs["bias"] = torch.randn(V)
    floats = {name for name in inputs if name != "labels"}
    return {
        name: value.to(DEVICE, dtype).requires_grad_() if name in floats else value.to(DEVICE)
        for name, value in inputs.items()
    }


def split_options(options: dict, inputs: dict) -> dict:
    return {name: value for name, value in options.items() if name not in ("bias", *inputs)}


def values_and_gradients(function, inputs: dict, dlogps, **options):
    logps = function(**inputs, **options)
    leaves = [value for value in inputs.values() if value.requires_grad]
    gradients = torch.autograd.grad(logps, leaves, dlogps.to(logps.dtype))
    return logps.detach(), dict(zip((n for n, v in inputs.items() if v.requires_grad), gradients, strict=True))


def largest_logit(inputs: dict, options: dict) -> float:
    wide = upcast(inputs, torch.float64)
    z = wide["hidden_states"] @ wide["lm_head_weight"].T + wide.get("bias", 0.0)
    return (z * options.get("logit_scale", 1.0)).abs().max().item() / options.get("temperature", 1.0)


def check(inputs: dict, backend: str, dlogps=None, workspace_bytes=None, **options) -> tuple[torch.Tensor, dict]:
    """The op against float64 of the same operands, bounded by the reference in float32; its values and gradients."""
    dlogps = torch.randn(inputs["labels"].shape, device=DEVICE) if dlogps is None else dlogps
    logps, gradients = values_and_gradients(
        linear_logps, inputs, dlogps, backend=backend, workspace_bytes=workspace_bytes, **options
    )
    base, base_gradients = values_and_gradients(linear_logps_ref, upcast(inputs, torch.float32), dlogps, **options)
    gold, gold_gradients = values_and_gradients(linear_logps_ref, upcast(inputs, torch.float64), dlogps, **options)
    assert logps.dtype == torch.float32
    assert_logps_close("logps", logps, base, gold, largest_logit(inputs, options))
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_close(f"gradient of {name}", gradient, base_gradients[name], gold_gradients[name])
    return logps, gradients


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_shapes(shape, dtype, backend):
    check(make_inputs(*shape, dtype), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_bfloat16_of_the_torch_backend(shape):
    """The twins accumulate in float32 on any device; the interpreter cannot multiply this type."""
    check(make_inputs(*shape, torch.bfloat16), "torch")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_options(options, dtype, backend):
    inputs = make_inputs(37, 130, 40, dtype, bias="bias" in options)
    check(inputs, backend, **split_options(options, inputs))


def test_every_tile_of_the_block_table(backend):
    for more in (8, 16):  # rows that are no multiples of 16 elements, and rows that are
        blocks = head_blocks(torch.empty(1, 64 + more, device=DEVICE))
        for rows, entries in ((-1, -1), (0, 0), (1, 1)):
            check(make_inputs(blocks.BLOCK_N + rows, 2 * blocks.BLOCK_V + entries, blocks.BLOCK_H + more), backend)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_confident_tokens_keep_their_digits(dtype, backend):
    """log p = -1e-9 has no digits left in z - lse; its gradient p - 1 has none in a rounded probability minus one."""
    V, H = 64, 32
    weight, margins = torch.zeros(V, H), torch.tensor([6.0, 10.0, 15.0, 20.0, 24.0])
    weight[0, 0] = 1.0
    hidden_states = torch.zeros(len(margins), H)
    hidden_states[:, 0] = margins
    inputs = {"hidden_states": hidden_states, "lm_head_weight": weight}
    inputs = {name: value.to(DEVICE, dtype).requires_grad_() for name, value in inputs.items()}
    inputs["labels"] = torch.zeros(len(margins), dtype=torch.int64, device=DEVICE)
    dlogps = torch.ones(len(margins), device=DEVICE)
    logps, gradients = values_and_gradients(linear_logps, inputs, dlogps, backend=backend)
    gold, gold_gradients = values_and_gradients(linear_logps_ref, upcast(inputs, torch.float64), dlogps)
    assert (gold > -3e-1).all() and gold[-1] > -1e-8
    assert ((logps - gold) / gold).abs().max() < 1e-5
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    dhidden, gold_dhidden = gradients["hidden_states"][:, 0], gold_gradients["hidden_states"][:, 0]
    # float16 has no numbers under 6e-8: rows that small cannot be held by the result's own dtype.
    representable = gold_dhidden.abs() > torch.finfo(dtype).smallest_normal
    assert representable.sum() >= 2
    assert ((dhidden - gold_dhidden) / gold_dhidden)[representable].abs().max() < tolerance


@pytest.mark.parametrize("offset", [1000.0, -250.0])
def test_large_and_very_negative_logits(offset, backend):
    """A running maximum that starts at 0, or an exponential without one, breaks on these."""
    inputs = make_inputs(21, 97, 40)
    with torch.no_grad():
        inputs["hidden_states"][:, 0] = 1.0
        inputs["lm_head_weight"][:, 0] = offset
        logits = inputs["hidden_states"] @ inputs["lm_head_weight"].T
        assert (logits.abs() > 200).all() and (logits.sign() == torch.sign(logits[0, 0])).all()
    check(inputs, backend)


def test_logits_of_size_1000_on_both_sides(backend):
    check(make_inputs(21, 97, 40, spread=300.0), backend)


def test_masked_vocabulary(backend):
    """A bias of -inf takes an entry out of the softmax."""
    inputs = make_inputs(19, 75, 24, bias=True)
    with torch.no_grad():
        inputs["bias"][60:] = float("-inf")
        inputs["labels"].clamp_(max=59)
    shorter = {name: value if name in ("hidden_states", "labels") else value[:60] for name, value in inputs.items()}
    logps = linear_logps(**inputs, backend=backend)
    torch.testing.assert_close(logps, linear_logps(**shorter, backend=backend))


@pytest.mark.parametrize("wanted", ["hidden_states", "lm_head_weight", "bias"])
def test_only_one_gradient(wanted, backend):
    inputs = make_inputs(18, 65, 24, bias=True)
    for name in ("hidden_states", "lm_head_weight", "bias"):
        inputs[name].requires_grad_(name == wanted)
    check(inputs, backend)


@pytest.mark.parametrize("chunks", ["one chunk", "chunks of 7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_frozen_head(dtype, chunks, backend, monkeypatch):
    """One derivative by the hidden states, kept from the forward pass, serves any upstream gradient."""
    if chunks != "one chunk":
        tokens_at_once = 7 * 130 * 4
        schedule = frozen_head.token_logps_and_slopes
        monkeypatch.setattr(
            frozen_head,
            "token_logps_and_slopes",
            lambda *args, **options: schedule(*args, **options | dict(workspace_bytes=tokens_at_once)),
        )
    inputs = make_inputs(17, 130, 40, dtype, bias=True)
    inputs["lm_head_weight"].requires_grad_(False)
    inputs["bias"].requires_grad_(False)
    check(inputs, backend, logit_scale=0.8, softcap=6.0, temperature=1.25)
    inputs["hidden_states"].requires_grad_()
    logps = linear_logps(**inputs, backend=backend)
    for dlogps in (torch.ones(17), torch.randn(17)):
        (gradient,) = torch.autograd.grad(logps, inputs["hidden_states"], dlogps.to(DEVICE), retain_graph=True)
        assert (gradient[inputs["labels"] == -100] == 0).all() and gradient.isfinite().all()


def test_non_contiguous_operands(backend):
    inputs = make_inputs(20, 67, 24)
    inputs["hidden_states"] = inputs["hidden_states"].detach().T.contiguous().T.requires_grad_()
    inputs["lm_head_weight"] = inputs["lm_head_weight"].detach().T.contiguous().T.requires_grad_()
    assert not any(inputs[name].is_contiguous() for name in ("hidden_states", "lm_head_weight"))
    check(inputs, backend)


def test_strided_rows(backend):
    inputs = make_inputs(20, 67, 24)
    wide = torch.randn(20, 2, 24, device=DEVICE)
    inputs["hidden_states"] = wide[:, 1].requires_grad_()
    inputs["lm_head_weight"] = torch.randn(134, 24, device=DEVICE)[::2].requires_grad_()
    check(inputs, backend)


def test_stride_0_upstream_gradient(backend):
    inputs = make_inputs(20, 67, 24)
    check(inputs, backend, dlogps=torch.ones((), device=DEVICE).expand(20))


def test_misaligned_labels(backend):
    inputs = make_inputs(20, 67, 24)
    inputs["labels"] = torch.cat([inputs["labels"][:1], inputs["labels"]])[1:]
    assert inputs["labels"].data_ptr() % 16
    check(inputs, backend)


def test_misaligned_weight(backend):
    inputs = make_inputs(20, 67, 24, torch.float16)
    storage = torch.zeros(67 * 24 + 1, dtype=torch.float16, device=DEVICE)
    storage[1:] = inputs["lm_head_weight"].detach().flatten()
    inputs["lm_head_weight"] = storage[1:].view(67, 24).requires_grad_()
    assert inputs["lm_head_weight"].data_ptr() % 16
    check(inputs, backend)


def test_leading_dimensions(backend):
    inputs = make_inputs(24, 67, 24)
    flat = linear_logps(**inputs, backend=backend)
    inputs["hidden_states"], inputs["labels"] = (
        inputs["hidden_states"].view(2, 3, 4, 24),
        inputs["labels"].view(2, 3, 4),
    )
    shaped = linear_logps(**inputs, backend=backend)
    assert shaped.shape == (2, 3, 4) and torch.equal(shaped.flatten(), flat)


def test_ignored_rows_are_zero_and_never_read(backend):
    inputs = make_inputs(40, 67, 24)
    ignored = inputs["labels"] == -100
    clean, gradients = values_and_gradients(linear_logps, inputs, torch.randn(40, device=DEVICE), backend=backend)
    assert (clean[ignored] == 0).all() and (clean[~ignored] < 0).all()
    assert (gradients["hidden_states"][ignored] == 0).all()
    with torch.no_grad():
        inputs["hidden_states"][ignored] = float("nan")
    dlogps = torch.where(ignored, float("nan"), torch.randn(40, device=DEVICE))
    poisoned, gradients = values_and_gradients(linear_logps, inputs, dlogps, backend=backend)
    assert torch.equal(poisoned, clean)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("labels", [[], [-100] * 5], ids=["no tokens", "all ignored"])
def test_nothing_to_count(labels, backend):
    hidden_states = torch.randn(len(labels), 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(11, 8, device=DEVICE, requires_grad=True)
    logps = linear_logps(hidden_states, weight, torch.tensor(labels, dtype=torch.int64, device=DEVICE), backend=backend)
    logps.sum().backward()
    assert (logps == 0).all() and logps.shape == (len(labels),)
    assert torch.equal(hidden_states.grad, torch.zeros_like(hidden_states))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_another_ignore_index(backend):
    inputs = make_inputs(20, 67, 24)
    expected = linear_logps(**inputs, backend=backend)
    inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 7_000)
    assert torch.equal(linear_logps(**inputs, ignore_index=7_000, backend=backend), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_slices_of_the_vocabulary(dtype, backend):
    """A budget of one step makes as many slices as there are; the gradients only change by rounding."""
    # Four splits of a kernel, and three of the twins' smallest slices.
    inputs = make_inputs(20, 200 if backend == "triton" else 700, 40, dtype, bias=True)
    with pytest.raises(ValueError, match="workspace_bytes must be at least") as refused:
        linear_logps(**inputs, workspace_bytes=1, backend=backend)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    dlogps = torch.randn(20, device=DEVICE)
    many = check(inputs, backend, dlogps, workspace_bytes=least)
    one = values_and_gradients(linear_logps, inputs, dlogps, backend=backend)
    if backend == "triton":
        assert torch.equal(many[0], one[0])
    for name, gradient in many[1].items():
        assert relative_error(gradient, one[1][name]) < 2 * torch.finfo(dtype).eps


def test_same_bits_every_time(backend):
    inputs, dlogps = make_inputs(20, 130, 40), torch.randn(20, device=DEVICE)
    first = values_and_gradients(linear_logps, inputs, dlogps, backend=backend)
    second = values_and_gradients(linear_logps, inputs, dlogps, backend=backend)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_logps_do_not_depend_on_the_batch(backend):
    """A kernel's row has the same bits in any company; MKL's may move by rounding with the shape of the product."""
    inputs = make_inputs(40, 130, 40, ignored=False)
    together = linear_logps(**inputs, backend=backend)
    few = {**inputs, "hidden_states": inputs["hidden_states"][3:24], "labels": inputs["labels"][3:24]}
    apart = linear_logps(**few, backend=backend)
    if backend == "triton":
        assert torch.equal(together[3:24], apart)
    torch.testing.assert_close(together[3:24], apart, rtol=1e-6, atol=1e-5)


def test_backward_twice():
    inputs = make_inputs(20, 67, 24)
    loss = linear_logps(**inputs).sum()
    loss.backward(retain_graph=True)
    once = inputs["lm_head_weight"].grad.clone()
    loss.backward()
    assert torch.equal(inputs["lm_head_weight"].grad, 2 * once)


def test_gradcheck():
    """float64 runs the torch schedule end to end."""
    inputs = upcast(make_inputs(7, 11, 5, bias=True), torch.float64)

    def function(hidden_states, lm_head_weight, bias):
        options = dict(logit_scale=0.8, softcap=6.0, temperature=1.25, backend="torch")
        return linear_logps(hidden_states, lm_head_weight, inputs["labels"], bias=bias, **options)

    leaves = (inputs["hidden_states"], inputs["lm_head_weight"], inputs["bias"])
    assert function(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(function, leaves)


def test_long_sequences_of_16_bit_operands(backend):
    """Design target: a 1024-token log-probability within 5e-4 nat of float64 of the same operands."""
    dtype = torch.bfloat16 if backend == "torch" else KERNEL_DTYPES[-1]
    inputs = make_inputs(1024, 97, 32, dtype, ignored=False)
    logps = linear_logps(**inputs, backend=backend)
    gold = linear_logps_ref(**upcast(inputs, torch.float64))
    assert (logps.double().sum() - gold.sum()).abs() < 5e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    inputs = {name: x.detach().to("cuda:1") for name, x in make_inputs(20, 67, 24).items()}
    gold = linear_logps_ref(**upcast(inputs, torch.float64))
    assert (linear_logps(**inputs) - gold).abs().max() < 1e-4


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs 13 GB of device memory")
def test_more_logits_than_int32_counts():
    """16,800 tokens x 128,256 entries pass 2^31."""
    T, V, H = 16_800, 128_256, 64
    hidden_states = torch.randn(T, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16).mul_(0.3).requires_grad_()
    labels = torch.randint(V, (T,), device=DEVICE)
    logps = linear_logps(hidden_states, weight, labels, workspace_bytes=6 * 2**30)
    logps.sum().backward()
    tail = slice(T - 64, T)
    gold_hidden = hidden_states.detach()[tail].double().requires_grad_()
    gold = linear_logps_ref(gold_hidden, weight.detach().double(), labels[tail])
    (gold_gradient,) = torch.autograd.grad(gold.sum(), gold_hidden)
    assert (logps[tail] - gold).abs().max() < 1e-4
    assert relative_error(hidden_states.grad[tail], gold_gradient) < 3e-3

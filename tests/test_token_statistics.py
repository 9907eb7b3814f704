"""Further numbers of a row's softmax: right, of the same bits in either pass over the logits, and only where wanted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from copg_kernels import linear_logps, linear_token_statistics
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.row_statistics import Wanted
from copg_kernels.schedules import forward, frozen_head
from tests.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")

T, H = 33, 16
# Several splits of a kernel's vocabulary, the last tile not full.
V = 131
OUTPUTS = Wanted._fields
HEADS = {
    "plain": {},
    "cap": dict(softcap=6.0, logit_scale=0.8, temperature=1.25),
    "bias": dict(temperature=0.7),
}


def operands(dtype=torch.float32, scale: float = 2.0, bias: bool = False) -> dict:
    weight, hidden_states = torch.randn(V, H, device=DEVICE), scale * torch.randn(T, H, device=DEVICE)
    tensors = dict(hidden_states=hidden_states, lm_head_weight=weight / H**0.5)
    if bias:
        tensors["bias"] = torch.randn(V, device=DEVICE)
    floats = {name: x.to(dtype) for name, x in tensors.items()}
    labels = torch.randint(V, (T,), device=DEVICE)
    # Of half of the rows the label is the argmax.
    labels[::2] = (floats["hidden_states"].double() @ floats["lm_head_weight"].double().T).argmax(1)[::2]
    labels[::5] = -100
    return floats | dict(labels=labels)


def expected(hidden_states, lm_head_weight, labels, bias=None, logit_scale=1.0, softcap=None, temperature=1.0) -> dict:
    """In float64, from all logits."""
    logits = hidden_states.detach().double() @ lm_head_weight.double().T
    logits = logit_scale * (logits if bias is None else logits + bias.double())
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    log_p, counted = logits.log_softmax(-1), labels != -100
    return dict(
        entropy=torch.special.entr(log_p.exp()).sum(-1).where(counted, 0.0),
        log_sum_sq_probs=(2 * log_p).logsumexp(-1).where(counted, 0.0),
        mean_logits=logits.mean(-1).where(counted, 0.0),
        is_top1=(logits.argmax(-1) == labels) & counted,
    )


def check(output, gold: dict[str, Tensor], rtol: float = 2e-5, atol: float = 3e-6) -> None:
    for name, value in gold.items():
        actual = getattr(output, name)
        if name == "is_top1":
            assert actual.dtype == torch.bool and actual.tolist() == value.tolist()
        else:
            torch.testing.assert_close(actual, value.float(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("frozen", [False, True], ids=["streaming", "frozen head"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(dtype, head, frozen, backend):
    inputs = operands(dtype, bias=head != "plain")
    inputs["hidden_states"].requires_grad_(frozen)
    options = dict(HEADS[head], backend=backend)
    output = linear_token_statistics(**inputs, **options, outputs=OUTPUTS, expected_gradients="logps")
    gold = expected(**inputs, **HEADS[head])
    assert gold["is_top1"].any() and not gold["is_top1"][inputs["labels"] != -100].all()
    check(output, gold)
    assert torch.equal(output.per_token_logps, linear_logps(**inputs, **options))
    assert not any(getattr(output, name).requires_grad for name in OUTPUTS[1:])


def test_ties_go_to_the_first(backend):
    """Integers, so that logits tie to the bit: two largest in one tile, in two tiles and in two splits."""
    hidden_states = torch.ones(6, H, device=DEVICE)
    weight = torch.zeros(V, H, device=DEVICE)
    ties = {(3, 5): 1, (7, 40): 2, (9, 125): 3}
    for row, (first, second) in enumerate(ties):
        hidden_states[2 * row : 2 * row + 2] = torch.nn.functional.one_hot(torch.tensor(row), H).float()
        weight[[first, second], row] = 2.0
    labels = torch.tensor([column for tie in ties for column in tie], device=DEVICE)
    for leaf in (hidden_states, hidden_states.clone().requires_grad_()):
        output = linear_token_statistics(
            leaf, weight, labels, outputs=["is_top1"], backend=backend, expected_gradients="logps"
        )
        assert output.is_top1.tolist() == [True, False] * 3
    # Where all logits are equal, the first entry is the argmax.
    output = linear_token_statistics(
        hidden_states * 0, weight, torch.arange(6, device=DEVICE), outputs=["is_top1"], backend=backend
    )
    assert output.is_top1.tolist() == [True] + [False] * 5


def test_entries_of_probability_zero(backend):
    """A bias that masks half of the vocabulary, a label among it: the mean is then -inf, as TRL's."""
    inputs = operands()
    inputs["labels"][1] = V - 1
    bias = torch.zeros(V, device=DEVICE)
    bias[V // 2 :] = float("-inf")
    output = linear_token_statistics(**inputs, bias=bias, outputs=OUTPUTS, backend=backend)
    check(output, expected(**inputs, bias=bias))
    assert output.mean_logits[1] == float("-inf") and not output.is_top1[1]


def test_confident_rows_keep_their_digits(backend):
    inputs = operands(scale=0.0)
    inputs["labels"] = torch.arange(T, device=DEVICE)
    inputs["hidden_states"] = inputs["lm_head_weight"][:T] * 30
    output = linear_token_statistics(**inputs, outputs=["log_sum_sq_probs"], backend=backend)
    gold = expected(**inputs)["log_sum_sq_probs"]
    assert (gold > -1e-6).any()
    torch.testing.assert_close(output.log_sum_sq_probs, gold.float(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_passes_give_the_same_bits(dtype, backend):
    """The streaming one and the one that keeps its tile, each output asked for alone and with the others."""
    hidden_states, weight, bias, labels = operands(dtype, bias=True).values()
    head = Head(weight, bias, 0.8, 6.0, 1.25)
    options = dict(ignore_index=-100, workspace_bytes=2**20, backend=backend)
    logps, _, plain = forward.token_logps(hidden_states, head, labels, **options)
    assert all(x.numel() == 0 for x in plain)
    together = []
    for schedule in (forward.token_logps, frozen_head.token_logps_and_slopes):
        first, *_, every = schedule(hidden_states, head, labels, **options, wanted=Wanted(True, True, True, True))
        together.append(every)
        assert backend == "torch" or torch.equal(first, logps)
        for i in range(1, len(OUTPUTS)):
            wanted = Wanted(*(i == j for j in range(len(OUTPUTS))))
            first, *_, alone = schedule(hidden_states, head, labels, **options, wanted=wanted)
            assert torch.equal(alone[i], every[i]) and [x.numel() for x in alone].count(0) == 3
    if backend == "triton":  # the twins cut the vocabulary differently
        assert all(torch.equal(*pair) for pair in zip(*together, strict=True))


def test_edges(backend):
    inputs = operands()
    empty = dict(inputs, hidden_states=inputs["hidden_states"][:0], labels=inputs["labels"][:0])
    output = linear_token_statistics(**empty, outputs=OUTPUTS, backend=backend)
    assert all(x.shape == (0,) for x in output) and output.is_top1.dtype == torch.bool
    shaped = dict(inputs, hidden_states=inputs["hidden_states"].view(3, 11, H), labels=inputs["labels"].view(3, 11))
    output = linear_token_statistics(**shaped, outputs=["is_top1"], backend=backend)
    assert output.is_top1.shape == (3, 11) and output.entropy is output.mean_logits is output.log_sum_sq_probs is None


def test_unknown_outputs_are_refused():
    inputs = operands()
    with pytest.raises(ValueError, match="outputs must be of entropy, .*is_top1, got 'logits'"):
        linear_token_statistics(**inputs, outputs=["logits"], backend="torch")
    with pytest.raises(TypeError, match="outputs must be a sequence of names, got 'entropy'"):
        linear_token_statistics(**inputs, outputs="entropy", backend="torch")


def test_compiles_without_a_break(backend):
    inputs = operands()

    def function() -> tuple:
        return tuple(linear_token_statistics(**inputs, outputs=OUTPUTS, backend=backend))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(compiled(), function(), strict=True))

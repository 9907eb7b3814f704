"""Entropy beside the log-probabilities: from the same logits, and without disturbing a bit of them."""

import pytest
import torch

from copg_kernels import linear_logps, linear_logps_and_entropy
from copg_kernels.kernels.head import Head
from copg_kernels.schedules import forward, frozen_head
from tests.conftest import DEVICE, KERNEL_DTYPES
from tests.test_work import MatmulFlops

T, V, H = 37, 301, 24


def operands(dtype=torch.float32, scale: float = 3.0) -> dict:
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[::5] = -100
    return dict(
        hidden_states=(scale * torch.randn(T, H, device=DEVICE)).to(dtype),
        lm_head_weight=(torch.randn(V, H, device=DEVICE) / H**0.5).to(dtype),
        labels=labels,
    )


def entropy_of(hidden_states, lm_head_weight, labels, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """-sum p log p in float64, from all logits."""
    logits = hidden_states.double() @ lm_head_weight.double().T
    logits = logit_scale * (logits if bias is None else logits + bias.double())
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    return torch.special.entr(logits.softmax(-1)).sum(-1) * (labels != -100)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["streaming", "frozen head"])
@pytest.mark.parametrize("head", [{}, dict(logit_scale=0.8, softcap=6.0, temperature=1.25)], ids=["plain", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_entropy(dtype, head, frozen_head, backend):
    if backend == "triton" and dtype not in KERNEL_DTYPES:
        pytest.skip("the interpreter cannot multiply bfloat16")
    inputs = operands(dtype)
    if head:
        inputs["bias"] = torch.randn(V, device=DEVICE).to(dtype)
    inputs["hidden_states"].requires_grad_(frozen_head)
    logps, entropy = linear_logps_and_entropy(**inputs, **head, backend=backend)
    assert torch.equal(logps, linear_logps(**inputs, **head, backend=backend)) and not entropy.requires_grad
    expected = entropy_of(**inputs, **head).float()
    assert expected.max() > 2 and (entropy[::5] == 0).all()
    torch.testing.assert_close(entropy, expected.detach(), rtol=2e-5, atol=2e-6)


def test_gradients_are_those_of_the_log_probs(backend):
    inputs = operands()
    for name in ("hidden_states", "lm_head_weight"):
        inputs[name].requires_grad_()
    dlogps = torch.randn(T, device=DEVICE)
    both = linear_logps_and_entropy(**inputs, backend=backend)[0], linear_logps(**inputs, backend=backend)
    trained = (inputs["hidden_states"], inputs["lm_head_weight"])
    pairs = zip(*(torch.autograd.grad(logps, trained, dlogps) for logps in both), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["streaming", "frozen head"])
def test_confident_rows_keep_their_digits(frozen_head, backend):
    """An entropy of 1e-7 where the label is the sure token; where it is another, the float32 sum rounds."""
    inputs = operands(scale=0.01)
    sure = torch.arange(T, device=DEVICE) % V
    with torch.no_grad():
        inputs["hidden_states"][:, :] = inputs["lm_head_weight"][sure] * 40
        inputs["lm_head_weight"][: V // 2] *= 1.5
    inputs["hidden_states"].requires_grad_(frozen_head)
    inputs["labels"] = torch.where(torch.arange(T, device=DEVICE) % 2 == 0, sure, 7)
    _, entropy = linear_logps_and_entropy(**inputs, backend=backend)
    expected = entropy_of(**inputs).float().detach()
    assert (expected[::2] < 1e-6).any()
    torch.testing.assert_close(entropy[::2], expected[::2], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=2e-7)


def test_entries_of_probability_zero(backend):
    """A bias that masks half of the vocabulary, a label among it."""
    inputs = operands()
    bias = torch.zeros(V, device=DEVICE)
    bias[V // 2 :] = float("-inf")
    inputs["labels"][1] = V - 1
    logps, entropy = linear_logps_and_entropy(**inputs, bias=bias, backend=backend)
    assert logps[1] == float("-inf")
    torch.testing.assert_close(entropy, entropy_of(**inputs, bias=bias).float(), rtol=1e-5, atol=1e-6)


def test_edges(backend):
    inputs = operands()
    none = dict(inputs, labels=torch.full((T,), -100, device=DEVICE))
    assert (linear_logps_and_entropy(**none, backend=backend)[1] == 0).all()
    empty = dict(inputs, hidden_states=inputs["hidden_states"][:0], labels=inputs["labels"][:0])
    assert linear_logps_and_entropy(**empty, backend=backend)[1].shape == (0,)
    shaped = dict(
        inputs, hidden_states=inputs["hidden_states"][:36].view(3, 12, H), labels=inputs["labels"][:36].view(3, 12)
    )
    assert linear_logps_and_entropy(**shaped, backend=backend)[1].shape == (3, 12)
    with pytest.raises(TypeError, match="labels"):
        linear_logps_and_entropy(**dict(inputs, labels=inputs["labels"].float()), backend=backend)


def test_no_product_more():
    hidden_states, weight, labels = operands().values()
    options = dict(ignore_index=-100, workspace_bytes=2**20, backend="torch")
    for schedule in (forward.token_logps, frozen_head.token_logps_and_slopes):
        flops = []
        for entropy in (False, True):
            with MatmulFlops() as counter:
                schedule(hidden_states, Head(weight, None, 1.0, None, 1.0), labels, **options, entropy=entropy)
            flops.append(counter.flops)
        assert flops[0] == flops[1] > 0


def test_compiles_without_a_break(backend):
    inputs = operands()
    compiled = torch.compile(linear_logps_and_entropy, fullgraph=True, backend="aot_eager")
    expected = linear_logps_and_entropy(**inputs, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(compiled(**inputs, backend=backend), expected, strict=True))

"""The fused loss, the frozen head and the entropy where ranks hold shards of the head, against one process."""

import re
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from copg_kernels import linear_copg_loss
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.parallel import (
    parallel_linear_copg_loss,
    parallel_linear_logps,
    parallel_linear_logps_and_entropy,
    shard_bounds,
)
from copg_kernels.reference import linear_copg_loss_ref, linear_entropy_ref, linear_logps_ref
from tests.numerics import assert_close, relative_error, upcast
from tests.ranks import Ranks
from tests.test_copg import make_batch
from tests.test_work import MatmulFlops

H, LENGTHS = 24, [5, 7, 1, 9, 12, 3, 30, 2]
PAIRS, FOURS, RAGGED = dict(group_size=2), dict(group_size=4), dict(cu_groups=torch.tensor([0, 2, 5, 8]).int())
HEAD, BONUS = dict(logit_scale=0.8, softcap=6.0, temperature=1.25), dict(entropy_coef=0.7)
# Of the largest shard's logits: two chunks of pairs, or of ragged groups, and less than a group of four.
TOKENS = 40
# A power of two, which rounds nothing once more.
UPSTREAM = 2.0
WIDE, NARROW = [700, 0, 800], [64, 0, 33]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(3, tmp_path_factory.mktemp("ranks") / "store", preload=["tests.test_work"])
    yield ranks
    ranks.stop()


# One call on every rank


@contextmanager
def counted_collectives():
    """How often this rank takes part in a collective on tensors, and with how many bytes, by its name."""
    sent, gather, reduce = dict(all_gather=[], all_reduce=[]), dist.all_gather, dist.all_reduce

    def counted_gather(output, tensor, group):
        sent["all_gather"].append(tensor.nbytes)
        gather(output, tensor, group=group)

    def counted_reduce(tensor, group):
        sent["all_reduce"].append(tensor.nbytes)
        reduce(tensor, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted_gather)
        patch.setattr(dist, "all_reduce", counted_reduce)
        yield sent


def on_a_rank(group, function, inputs: dict, sizes: list[int], trained: str, options: dict) -> dict:
    """Outputs, gradients, what was sent before the backward pass and in it, and the GEMMs' work in units."""
    rank = dist.get_rank(group)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = {name: value[rows] if name in ("lm_head_weight", "bias") else value for name, value in inputs.items()}
    mine["lm_head_shard"] = mine.pop("lm_head_weight")
    leaves = [name for name in ("hidden_states", "lm_head_shard", "bias") if name in mine and name[0] in trained]
    mine |= {name: mine[name].clone().requires_grad_() for name in leaves}
    with counted_collectives() as sent, MatmulFlops() as counter:
        arrives = options.get("arrives", "logps")
        outputs = function(**mine, **{name: value for name, value in options.items() if name != "arrives"}, group=group)
        before = {name: list(sizes) for name, sizes in sent.items()}
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = outputs.loss if hasattr(outputs, "loss") else of_tokens(outputs, arrives)
        gradients = torch.autograd.grad(loss, [mine[name] for name in leaves], UPSTREAM * torch.ones_like(loss))
    counted = int((inputs["labels"] != -100).sum())
    return dict(
        outputs={name: value.detach() for name, value in named(outputs).items()},
        gradients=dict(zip(leaves, gradients, strict=True)),
        forward=before,
        backward={name: sizes[len(before[name]) :] for name, sizes in sent.items()},
        units=counter.flops / (2 * counted * H * max(1, sizes[rank])),
    )


def of_tokens(outputs: tuple, arrives: str) -> torch.Tensor:
    """A number whose derivatives by log-probs and entropy differ from token to token; or by one of the two alone."""
    weights = torch.arange(outputs[0].numel(), dtype=outputs[0].dtype)
    terms = {"logps": lambda: (weights.cos() * outputs[0]).sum(), "entropy": lambda: (weights.sin() * outputs[1]).sum()}
    return sum(term() for name, term in terms.items() if arrives in (name, "both"))


def named(outputs) -> dict:
    if hasattr(outputs, "_asdict"):
        return {name: value for name, value in outputs._asdict().items() if value is not None}
    return dict(zip(("logps", "entropy"), outputs, strict=False))


def whole(results: list[dict]) -> tuple[dict, dict]:
    """Results of all ranks -> outputs and gradients under the names of one process; replicated ones have equal bits."""
    outputs, gradients = results[0]["outputs"], results[0]["gradients"]
    for other in results[1:]:
        assert all(torch.equal(other["outputs"][name], value) for name, value in outputs.items())
        if "hidden_states" in gradients:
            assert torch.equal(other["gradients"]["hidden_states"], gradients["hidden_states"])
    joined = {name: value for name, value in gradients.items() if name == "hidden_states"}
    for name, of_all in (("lm_head_shard", "lm_head_weight"), ("bias", "bias")):
        if name in gradients:
            joined[of_all] = torch.cat([result["gradients"][name] for result in results])
    return outputs, joined


def batch_of(sizes: list[int], dtype=torch.float32, *, bias=False) -> dict:
    batch = {name: value.detach().cpu() for name, value in make_batch(dtype, sum(sizes), H, LENGTHS).items()}
    return batch | (dict(bias=torch.randn(sum(sizes)).to(dtype)) if bias else {})


def workspace_of(sizes: list[int], backend: str, itemsize: int) -> int:
    """Of so many tokens' logits."""
    if backend == "torch":
        return TOKENS * max(sizes) * max(4, itemsize)
    return TOKENS * (-(-max(sizes) // 64) * 64 * itemsize + -(-max(sizes) // 32) * 8)


def loss_of(ranks, batch: dict, sizes: list[int], trained: str = "hlb", **options) -> tuple[dict, dict, list[dict]]:
    results = ranks.run(on_a_rank, parallel_linear_copg_loss, batch, sizes, trained, options, size=len(sizes))
    return *whole(results), results


def check(batch: dict, outputs: dict, gradients: dict, options: dict) -> None:
    """Against float64 of the whole head, bounded by the reference in float32; log-probs and rewards of one process."""
    options = {name: value for name, value in options.items() if name not in ("workspace_bytes", "backend")}
    leaves = {name: value.requires_grad_(name in gradients) for name, value in batch.items()}
    coef = options.get("entropy_coef", 0.0)
    one = linear_copg_loss(**leaves, **options, backend="torch", return_entropy=True)
    for name in ("logps", "regularized_rewards", "log_ratios"):
        torch.testing.assert_close(outputs[name], getattr(one, name), rtol=1e-5, atol=1e-3)
    expected = []
    for dtype in (torch.float32, torch.float64):
        inputs = upcast(leaves, dtype)
        loss = linear_copg_loss_ref(**inputs, **{name: x for name, x in options.items() if name != "entropy_coef"})
        tokens = {
            name: value
            for name, value in inputs.items()
            if name in ("hidden_states", "lm_head_weight", "labels", "bias")
        }
        entropy = linear_entropy_ref(**tokens, **head_options(options))
        mean_entropy = entropy.sum() / (batch["labels"] != -100).sum()
        loss = loss - coef * mean_entropy
        wanted = [inputs[name] for name in gradients]
        found = torch.autograd.grad(loss, wanted, torch.full_like(loss, UPSTREAM)) if wanted else ()
        expected.append((loss.detach(), found))
    torch.testing.assert_close(outputs["loss"].double(), expected[1][0], rtol=1e-4, atol=0.0)
    for (name, gradient), base, gold in zip(gradients.items(), expected[0][1], expected[1][1], strict=True):
        assert gradient.dtype == batch[name].dtype
        assert_close(f"gradient of {name}", gradient, base, gold)
    torch.testing.assert_close(outputs["entropy"].double(), entropy.detach(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(outputs["mean_entropy"].double(), mean_entropy.detach(), rtol=1e-5, atol=0.0)


def head_options(options: dict) -> dict:
    return {name: value for name, value in options.items() if name in HEAD}


# The loss

CASES = {
    # dtype, groups, head's options, tokens fit, chunks or None where a group does not fit
    "float32, one chunk": (torch.float32, FOURS, {}, False, 1),
    "float32, every option, two chunks": (torch.float32, PAIRS, HEAD, True, 2),
    "float32, a bonus, two chunks": (torch.float32, PAIRS, HEAD | BONUS, True, 2),
    "float32, a bonus, recomputed": (torch.float32, FOURS, HEAD | BONUS, True, None),
    "float64, a bonus, two chunks": (torch.float64, RAGGED, HEAD | BONUS, True, 2),
    "bfloat16, two chunks": (torch.bfloat16, RAGGED, {}, True, 2),
    "float16, two chunks": (torch.float16, PAIRS, {}, True, 2),
    "float16, recomputed": (torch.float16, FOURS, {}, True, None),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(ranks, name):
    """On shards of 700, 0 and 800 rows; a unit is a GEMM of a rank's own."""
    dtype, groups, head, small_workspace, chunks = CASES[name]
    batch = batch_of(WIDE, dtype, bias=bool(head))
    options = dict(beta=0.3, average_logps=groups is RAGGED, **groups, **head)
    if small_workspace:
        options["workspace_bytes"] = workspace_of(WIDE, "torch", dtype.itemsize)
    outputs, gradients, results = loss_of(ranks, batch, WIDE, **options, return_entropy=True)
    check(batch, outputs, gradients, options)
    units, tokens = 4 if chunks is None else 3, sum(LENGTHS)
    assert outputs["gemm_units"] == units
    counted = int((batch["labels"] != -100).sum())
    for rank, result in enumerate(results):
        # The bias's own product, one column, aside.
        assert rank == 1 or result["units"] == pytest.approx(units, abs=0.1)
        assert sum(result["forward"]["all_gather"]) == 4 * 8 * counted
        assert len(result["forward"]["all_gather"]) == (chunks or 1)
        assert result["forward"]["all_reduce"] == [tokens * H * max(4, dtype.itemsize)]
        assert result["backward"] == dict(all_gather=[], all_reduce=[])


KERNEL_CASES = {
    "float32, two chunks": (torch.float32, "hlb", True, 3),
    "float32, a bonus, two chunks": (torch.float32, "hlb", True, 3),
    "bfloat16, one chunk": (torch.bfloat16, "hl", False, 3),
    "float16, recomputed": (torch.float16, "hl", False, 4),
    "float32, a frozen head": (torch.float32, "h", True, 2),
    "float16, a frozen head": (torch.float16, "h", False, 3),
}


@pytest.mark.skipif(not INTERPRETING, reason="kernels on CPU tensors run in the interpreter only")
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernels_on_shards(ranks, name):
    """64 rows leave no padding between rows of the tile: a label that is not here must not be written beside it."""
    dtype, trained, small_workspace, units = KERNEL_CASES[name]
    batch = batch_of(NARROW, dtype, bias="b" in trained)
    options = dict(beta=0.3, **PAIRS, **(HEAD if "b" in trained else {}), backend="triton")
    if "a bonus" in name:
        options |= BONUS
    if small_workspace:
        options["workspace_bytes"] = workspace_of(NARROW, "triton", dtype.itemsize)
    outputs, gradients, results = loss_of(ranks, batch, NARROW, trained, **options, return_entropy=True)
    check(batch, outputs, gradients, options)
    assert outputs["gemm_units"] == units
    for result in results:
        assert sum(result["forward"]["all_gather"]) == 4 * 4 * sum(LENGTHS)
        assert len(result["forward"]["all_gather"]) == 1 + small_workspace


FROZEN = {
    "groups fit": (PAIRS, 2),
    "groups do not": (FOURS, 2),
    "a bonus": (PAIRS | BONUS, 2),
    "a bonus, groups do not": (FOURS | BONUS, 3),
}


@pytest.mark.parametrize("groups, units", FROZEN.values(), ids=FROZEN)
def test_loss_with_a_frozen_head(ranks, groups, units):
    batch = batch_of(WIDE)
    options = dict(beta=0.3, **groups, workspace_bytes=workspace_of(WIDE, "torch", 4))
    outputs, gradients, results = loss_of(ranks, batch, WIDE, "h", **options, return_entropy=True)
    check(batch, outputs, gradients, options)
    assert outputs["gemm_units"] == units == pytest.approx(results[0]["units"], abs=0.1)
    assert all(len(result["forward"]["all_gather"]) == (2 if units == 2 else 1) for result in results)
    assert all(result["backward"] == dict(all_gather=[], all_reduce=[]) for result in results)


def test_without_gradients_the_loss_is_one_unit(ranks):
    batch, options = batch_of(WIDE), dict(beta=0.3, group_size=2)
    results = ranks.run(without_gradients, batch, WIDE, options)
    for output, sent in results:
        torch.testing.assert_close(output["loss"], linear_copg_loss(**batch, **options).loss)
        assert output["gemm_units"] == 1 and sent["all_reduce"] == [] and "entropy" not in output
        assert sum(sent["all_gather"]) == 3 * 8 * (batch["labels"] != -100).sum()


def without_gradients(group, batch, sizes, options):
    rank = dist.get_rank(group)
    shard = batch["lm_head_weight"].split(sizes)[rank]
    others = {name: value for name, value in batch.items() if name != "lm_head_weight"}
    with counted_collectives() as sent:
        return named(parallel_linear_copg_loss(lm_head_shard=shard, **others, **options, group=group)), sent


def test_the_smallest_workspace_plans_for_all(ranks):
    """Of a rank whose shard is empty, too: a rank that went through other chunks would wait for ever."""
    batch = batch_of(WIDE)
    results = ranks.run(with_own_workspace, batch, WIDE)
    assert all(gathers == 2 and units == 2 for gathers, units in results)


def with_own_workspace(group, batch, sizes):
    rank = dist.get_rank(group)
    shard = batch.pop("lm_head_weight").split(sizes)[rank].clone().requires_grad_()
    workspace = workspace_of(WIDE, "torch", 4) if rank == 1 else None
    with counted_collectives() as sent:
        output = parallel_linear_copg_loss(
            lm_head_shard=shard, **batch, beta=0.3, group_size=2, workspace_bytes=workspace, group=group
        )
    return len(sent["all_gather"]), output.gemm_units.item()


def test_padded_completions_and_a_dtensor(ranks):
    """V = 1,499 over three ranks as DTensor splits it; the gradients have its placement."""
    batch = dict(
        hidden_states=torch.randn(4, 6, H).double(),
        lm_head_weight=torch.randn(1499, H).double(),
        labels=torch.randint(1499, (4, 6)),
        ref_logps=torch.randn(4).double() - 50,
        rewards=torch.randn(4).double(),
    )
    batch["labels"][1:, 4:] = -100
    results = ranks.run(on_a_dtensor, batch)
    trained = ("hidden_states", "lm_head_weight")
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in batch.items()}
    one = linear_copg_loss(**leaves, beta=0.3, group_size=2)
    one.loss.backward()
    for loss, dhidden, dweight in results:
        assert relative_error(loss, one.loss.detach()) < 1e-13
        assert relative_error(dhidden, leaves["hidden_states"].grad) < 1e-12
        assert relative_error(dweight, leaves["lm_head_weight"].grad) < 1e-12


def on_a_dtensor(group, batch):
    weight = distribute_tensor(batch.pop("lm_head_weight"), DeviceMesh.from_group(group, "cpu"), [Shard(0)])
    weight.requires_grad_()
    hidden_states = batch.pop("hidden_states").requires_grad_()
    loss = parallel_linear_copg_loss(hidden_states, weight, **batch, beta=0.3, group_size=2).loss
    loss.backward()
    assert weight.grad.placements == (Shard(0),)
    assert weight.to_local().shape[0] == len(range(*shard_bounds(1499, 3, dist.get_rank(group))))
    return loss.detach(), hidden_states.grad, weight.grad.full_tensor()


# Log-probabilities: their entropy, and the frozen head

LOGPS_CASES = {
    # dtype, what is trained, head's options, which gradients are expected, which arrive, units
    "float32": (torch.float32, "hlb", {}, "both", "logps", 4),
    "both gradients": (torch.float32, "hlb", HEAD, "both", "both", 4),
    "a frozen head": (torch.float32, "h", HEAD, "logps", "logps", 2),
    "a frozen head, both": (torch.float32, "h", HEAD, "both", "both", 3),
    "a frozen head, the entropy's": (torch.float32, "h", HEAD, "entropy", "entropy", 2),
    "a frozen head, a wrong guess": (torch.float32, "h", {}, "logps", "entropy", 4),
    "a frozen head, bfloat16": (torch.bfloat16, "h", {}, "logps", "logps", 2),
    "a frozen head, float16": (torch.float16, "h", {}, "logps", "logps", 2),
    "a frozen head, float64": (torch.float64, "h", HEAD, "entropy", "entropy", 2),
}


def check_logps(ranks, sizes, dtype, trained, options) -> list[dict]:
    """Against float64 of the whole head, bounded by the reference in float32."""
    inputs = {name: value for name, value in batch_of(sizes, dtype, bias="b" in trained).items() if name[0] in "hlb"}
    results = ranks.run(on_a_rank, parallel_linear_logps_and_entropy, inputs, sizes, trained, options)
    outputs, gradients = whole(results)
    leaves = {name: value.requires_grad_(name in gradients) for name, value in inputs.items()}
    expected = []
    for wide in (torch.float32, torch.float64):
        of_head = upcast(leaves, wide)
        numbers = tuple(f(**of_head, **head_options(options)) for f in (linear_logps_ref, linear_entropy_ref))
        loss = of_tokens(numbers, options["arrives"])
        found = torch.autograd.grad(loss, [of_head[name] for name in gradients], UPSTREAM * torch.ones_like(loss))
        expected.append((*numbers, *found))
    torch.testing.assert_close(outputs["logps"].double(), expected[1][0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["entropy"].double(), expected[1][1].detach(), rtol=2e-5, atol=2e-6)
    for (name, gradient), base, gold in zip(gradients.items(), expected[0][2:], expected[1][2:], strict=True):
        assert gradient.dtype == dtype
        assert_close(f"gradient of {name}", gradient, base, gold)
    return results


@pytest.mark.parametrize("name", LOGPS_CASES)
def test_log_probs_and_entropy(ranks, name):
    dtype, trained, head, expected, arrives, units = LOGPS_CASES[name]
    options = dict(
        expected_gradients=expected, arrives=arrives, workspace_bytes=workspace_of(WIDE, "torch", dtype.itemsize)
    )
    results = check_logps(ranks, WIDE, dtype, trained, head | options)
    sum_of_dhidden = [sum(LENGTHS) * H * max(4, dtype.itemsize)]
    has_slopes = trained == "h" and expected != "both"
    for rank, result in enumerate(results):
        # 69 tokens of which 40 fit: two chunks, whose tiles stay until u is formed.
        assert len(result["forward"]["all_gather"]) == (2 if has_slopes else 1)
        assert result["forward"]["all_reduce"] == (sum_of_dhidden if has_slopes else [])
        assert result["backward"] == dict(all_gather=[], all_reduce=[] if units == 2 else sum_of_dhidden)
        assert rank == 1 or result["units"] == pytest.approx(units, abs=0.1)


def test_log_probs_have_the_bits_of_those_alone(ranks):
    inputs = {name: value for name, value in batch_of(WIDE).items() if name[0] in "hl"}
    for trained, options in (("hl", {}), ("h", dict(expected_gradients="logps"))):
        results = ranks.run(on_a_rank, parallel_linear_logps_and_entropy, inputs, WIDE, trained, options)
        alone = ranks.run(on_a_rank, parallel_linear_logps, inputs, WIDE, trained, {})
        for ours, other in zip(results, alone, strict=True):
            assert torch.equal(ours["outputs"]["logps"], other["outputs"]["logps"])
            assert all(torch.equal(ours["gradients"][name], value) for name, value in other["gradients"].items())
            sent = [sum(result["forward"]["all_gather"]) for result in (ours, other)]
            assert sent[0] * 3 == sent[1] * 4


KERNEL_LOGPS_CASES = {
    "a frozen head": (torch.float32, "h", "logps"),
    "a frozen head, the entropy's": (torch.float32, "h", "entropy"),
    "a frozen head, bfloat16": (torch.bfloat16, "h", "logps"),
    "a trainable head": (torch.float32, "hlb", "both"),
}


@pytest.mark.skipif(not INTERPRETING, reason="kernels on CPU tensors run in the interpreter only")
@pytest.mark.parametrize("name", KERNEL_LOGPS_CASES)
def test_kernels_of_log_probs_and_entropy(ranks, name):
    dtype, trained, arrives = KERNEL_LOGPS_CASES[name]
    workspace = workspace_of(NARROW, "triton", dtype.itemsize)
    options = dict(backend="triton", workspace_bytes=workspace, expected_gradients=arrives, arrives=arrives)
    for result in check_logps(ranks, NARROW, dtype, trained, options):
        assert sum(result["forward"]["all_gather"]) == 4 * 4 * sum(LENGTHS)
        assert bool(result["backward"]["all_reduce"]) == (trained != "h")


@pytest.mark.parametrize("backend", ["torch"] + ["triton"] * INTERPRETING)
def test_ignored_rows_get_nothing(ranks, backend):
    """Of a frozen head, whose chunk may be of ignored rows alone."""
    batch = batch_of(NARROW)
    batch["labels"][:45] = -100
    batch["hidden_states"][batch["labels"] == -100] = float("nan")
    inputs = {name: batch[name] for name in ("hidden_states", "lm_head_weight", "labels")}
    workspace = workspace_of(NARROW, backend, 4) if backend == "triton" else None
    options = dict(backend=backend, workspace_bytes=workspace, expected_gradients="logps")
    results = ranks.run(on_a_rank, parallel_linear_logps_and_entropy, inputs, NARROW, "h", options)
    outputs, gradients = whole(results)
    ignored = batch["labels"] == -100
    for value in (outputs["logps"], outputs["entropy"], gradients["hidden_states"]):
        assert (value[ignored] == 0).all() and value.isfinite().all() and value[~ignored].abs().min(0).values.max() > 0


# What is refused


def one_rank_differs(group, batch, sizes, function, change):
    rank = dist.get_rank(group)
    mine = batch | dict(lm_head_shard=batch["lm_head_weight"].split(sizes)[rank].clone().requires_grad_())
    del mine["lm_head_weight"]
    mine |= dict(beta=0.3, group_size=2) | (change if rank == 2 else {})
    function = mine.pop("function", function)
    if function is not parallel_linear_copg_loss:
        mine = {name: value for name, value in mine.items() if name in ("hidden_states", "lm_head_shard", "labels")}
    return function(**mine, group=group)


def changed(name: str) -> dict:
    """Two completions' numbers exchanged, which a sum alone would not notice."""
    return {name: torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])}


DISAGREEMENTS = [
    (dict(beta=0.2), r"beta must be the same on all ranks, got 0\.3 on rank 0, 1; 0\.2 on rank 2"),
    (dict(group_size=4), r"group_size must be the same on all ranks, got 2 on rank 0, 1; 4 on rank 2"),
    (dict(group_size=None, **RAGGED), r"group_size must be the same .*None on rank 2"),
    (dict(cu_seqlens=torch.tensor([0, 6, 12, 13, 22, 34, 37, 67, 69]).int()), r"cu_seqlens \(their checksum\) must"),
    (changed("ref_logps"), r"ref_logps \(their checksum\) must be the same"),
    (changed("rewards"), r"rewards \(their checksum\) must be the same"),
    (dict(average_logps=True), r"average_logps must be the same .*False on rank 0, 1; True on rank 2"),
    (dict(return_entropy=True), r"return_entropy must be the same"),
    (dict(lm_head_shard=torch.zeros(33, H)), r"need of a gradient of lm_head_shard must be the same.*False on rank 2"),
    (dict(function=parallel_linear_logps), r"the function must be the same .*; parallel_linear_logps on rank 2"),
    (dict(beta=-1.0), r"beta must be positive and finite, got -1\.0"),
    (dict(ref_logps=torch.zeros(7)), r"ref_logps must have shape \(N,\), one per completion, = \(8,\), got \(7,\)"),
    (dict(cu_seqlens=None), r"labels must have shape \(B, L\), or \(T,\) with cu_seqlens"),
    (dict(entropy_coef=0.1), r"entropy_coef must be the same .*0\.0 on rank 0, 1; 0\.1 on rank 2"),
    (dict(entropy_coef=None), r"entropy_coef must be a finite number, got None"),
    (dict(return_entropy="yes"), r"return_entropy must be a bool, got 'yes'"),
    (dict(rewards=torch.zeros(8, requires_grad=True)), r"rewards must not require a gradient.*pass rewards\.detach"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", DISAGREEMENTS, ids=[row[1][:30] for row in DISAGREEMENTS])
def test_ranks_that_disagree(ranks, change, message):
    """All of them hear of it, by the rank's number, and the group works on."""
    batch = batch_of(NARROW)
    for name in ("ref_logps", "rewards"):
        if name in change and change[name].shape == (8,):
            batch[name] = change[name].detach()[[1, 0, *range(2, 8)]]
    errors = ranks.errors(one_rank_differs, batch, NARROW, parallel_linear_copg_loss, change)
    for rank, error in enumerate(errors):
        assert re.search(message, error), f"rank {rank}: {error}"
        assert "same on all ranks" in error or rank == 2 or "rank 2 refused its arguments" in error
    ranks.run(one_rank_differs, batch, NARROW, parallel_linear_logps, {})


WRONG_ON_ALL = [
    (dict(rewards=torch.full((8,), float("nan"))), "rewards must be finite, got nan at index 0"),
    (dict(cu_seqlens=torch.arange(9).int()), "cu_seqlens must end at 69"),
    (dict(labels=torch.full((69,), 97)), r"labels must lie in \[0, 97\) or be ignore_index = -100, got 97 at index 0"),
]


@pytest.mark.parametrize("change, message", WRONG_ON_ALL, ids=[row[1][:20] for row in WRONG_ON_ALL])
def test_values_that_are_wrong_on_all_ranks(ranks, change, message):
    errors = ranks.errors(one_rank_differs, batch_of(NARROW) | change, NARROW, parallel_linear_copg_loss, {})
    assert all(re.search(f"^ValueError: {message}", error) for error in errors), errors


def test_no_second_derivative(ranks):
    errors = ranks.errors(twice, batch_of(NARROW), NARROW)
    assert all("create_graph must be False" in error for error in errors)


def twice(group, batch, sizes):
    output = one_rank_differs(group, batch, sizes, parallel_linear_copg_loss, {})
    output.loss.backward(create_graph=True)

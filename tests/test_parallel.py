"""Several processes against one: the same log-probs, losses and gradients, and the same errors on every rank."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from copg_kernels import linear_logps
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.parallel import parallel_linear_logps, shard_bounds
from copg_kernels.reference import linear_logps_ref
from tests.numerics import assert_close, assert_logps_close, relative_error, upcast
from tests.ranks import Ranks
from tests.test_linear_logps import largest_logit, make_inputs, values_and_gradients

EVERY_OPTION = dict(logit_scale=0.8, softcap=6.0, temperature=1.25)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.stop()


# The head


def on_cpu(inputs: dict) -> dict:
    return {name: value.detach().cpu() for name, value in inputs.items()}


def shard_of(group, inputs: dict, sizes: list[int], requires_grad: bool = True) -> dict:
    """This rank's arguments of parallel_linear_logps."""
    rank = dist.get_rank(group)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = dict(hidden_states=inputs["hidden_states"].clone(), lm_head_shard=inputs["lm_head_weight"][rows].clone())
    if "bias" in inputs:
        mine["bias"] = inputs["bias"][rows].clone()
    return {name: value.requires_grad_(requires_grad) for name, value in mine.items()} | dict(labels=inputs["labels"])


def logps_and_gradients(group, inputs, sizes, dlogps, options):
    mine = shard_of(group, inputs, sizes)
    logps = parallel_linear_logps(**mine, **options, group=group)
    leaves = {name: value for name, value in mine.items() if value.requires_grad}
    gradients = torch.autograd.grad(logps, list(leaves.values()), dlogps.to(logps.dtype))
    return logps.detach(), dict(zip(leaves, gradients, strict=True))


def whole(results: list) -> tuple:
    """Results of all ranks -> log-probs and gradients under the names of one process; replicated ones are equal."""
    logps, gradients = results[0]
    for other_logps, others in results[1:]:
        assert torch.equal(other_logps, logps)
        assert torch.equal(others["hidden_states"], gradients["hidden_states"])
    names = {"lm_head_shard": "lm_head_weight"} | {name: name for name in gradients if name == "bias"}
    shards = {ours: torch.cat([result[1][name] for result in results]) for name, ours in names.items()}
    return logps, {"hidden_states": gradients["hidden_states"]} | shards


def check(ranks, inputs: dict, sizes: list[int], **options) -> None:
    """All ranks together against float64 of the whole head, bounded by the reference in float32."""
    dlogps, head_options = torch.randn(inputs["labels"].shape), {k: v for k, v in options.items() if k != "backend"}
    results = ranks.run(logps_and_gradients, on_cpu(inputs), sizes, dlogps, options, size=len(sizes))
    logps, gradients = whole(results)
    inputs = {name: value.requires_grad_(name != "labels") for name, value in on_cpu(inputs).items()}
    base, base_gradients = values_and_gradients(linear_logps_ref, upcast(inputs, torch.float32), dlogps, **head_options)
    gold, gold_gradients = values_and_gradients(linear_logps_ref, upcast(inputs, torch.float64), dlogps, **head_options)
    assert_logps_close("logps", logps, base, gold, largest_logit(inputs, head_options))
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_close(f"gradient of {name}", gradient, base_gradients[name], gold_gradients[name])


SIZES = {
    "two equal shards": [150, 150],
    "301 over 4, as DTensor splits": [76, 76, 76, 73],
    "one row, most, a few": [1, 290, 10],
    "empty shards": [0, 301, 0],
    "a process alone": [301],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shards(ranks, sizes, dtype):
    """Of the torch backend: interpreted kernels take minutes for as many, and have a test of their own below."""
    check(ranks, make_inputs(37, sum(sizes), 70, dtype), sizes, backend="torch")


@pytest.mark.parametrize("name", ["bias", *EVERY_OPTION, "every option"])
def test_options(ranks, name):
    options = EVERY_OPTION if name == "every option" else {k: v for k, v in EVERY_OPTION.items() if k == name}
    check(ranks, make_inputs(37, 301, 70, bias=name in ("bias", "every option")), [120, 0, 181], **options)


@pytest.mark.skipif(not INTERPRETING, reason="kernels on CPU tensors run in the interpreter only")
def test_kernels_on_shards(ranks):
    check(ranks, make_inputs(19, 83, 24, bias=True), [33, 0, 50], **EVERY_OPTION, backend="triton")


def test_vocabulary_of_many_splits(ranks):
    """Each rank merges its own splits before the ranks are merged."""
    check(ranks, make_inputs(11, 14000, 16), [9000, 5000])


def test_float64(ranks):
    inputs = make_inputs(23, 97, 24, torch.float64, bias=True)
    dlogps = torch.randn(23, dtype=torch.float64)
    results = ranks.run(logps_and_gradients, on_cpu(inputs), [40, 0, 57], dlogps, EVERY_OPTION, size=3)
    logps, gradients = whole(results)
    inputs = {name: value.requires_grad_(name != "labels") for name, value in on_cpu(inputs).items()}
    gold, gold_gradients = values_and_gradients(linear_logps_ref, inputs, dlogps, **EVERY_OPTION)
    assert logps.dtype == torch.float64 and relative_error(logps, gold) < 1e-14
    for name, gradient in gradients.items():
        assert relative_error(gradient, gold_gradients[name]) < 1e-13


@pytest.mark.parametrize("backend", ["torch"] + ["triton"] * INTERPRETING)
def test_confident_tokens_keep_their_digits(ranks, backend):
    """log p = -1e-9 where one rank holds the label and the others what is left of the probability."""
    V, H = 12, 8
    weight, margins = torch.zeros(V, H), torch.tensor([6.0, 10.0, 15.0, 20.0, 24.0])
    weight[7, 0] = 1.0
    hidden_states = torch.zeros(len(margins), H)
    hidden_states[:, 0] = margins
    inputs = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=torch.full((len(margins),), 7))
    results = ranks.run(logps_and_gradients, inputs, [4, 3, 5], torch.ones(len(margins)), dict(backend=backend), size=3)
    logps, gradients = whole(results)
    others = torch.tensor(V - 1, dtype=torch.float64)
    gold = -torch.log1p(others * (-margins.double()).exp())
    assert gold[-1] > -1e-8
    assert ((logps - gold) / gold).abs().max() < 1e-5
    # dlogp/dx_0 = (1 - p) w_0: no digits are left of it in a rounded probability minus one.
    gold_slope = -torch.expm1(gold)
    assert ((gradients["hidden_states"][:, 0] - gold_slope) / gold_slope).abs().max() < 1e-5


def test_ignored_rows_get_nothing(ranks):
    inputs = on_cpu(make_inputs(20, 61, 16))
    inputs["hidden_states"][inputs["labels"] == -100] = float("nan")
    logps, gradients = whole(ranks.run(logps_and_gradients, inputs, [30, 31], torch.randn(20), {}, size=2))
    ignored = inputs["labels"] == -100
    assert (logps[ignored] == 0).all() and (gradients["hidden_states"][ignored] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_sum_over_ranks_is_rounded_once(ranks):
    """The twins compute with bfloat16 operands in float32, so only that rounding tells the two types apart."""
    inputs, dlogps = on_cpu(make_inputs(37, 301, 70, torch.bfloat16)), torch.randn(37)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    (_, gradients), *_ = ranks.run(logps_and_gradients, inputs, [76, 76, 76, 73], dlogps, {})
    (_, in_float32), *_ = ranks.run(logps_and_gradients, wide, [76, 76, 76, 73], dlogps, {})
    assert torch.equal(gradients["hidden_states"], in_float32["hidden_states"].bfloat16())


@pytest.mark.parametrize("backend", ["torch"] + ["triton"] * INTERPRETING)
@pytest.mark.parametrize("num_tokens", [0, 9])
def test_nothing_counts(ranks, num_tokens, backend):
    inputs = on_cpu(make_inputs(num_tokens, 61, 16, torch.bfloat16 if backend == "torch" else torch.float16))
    inputs["labels"].fill_(-100)
    arguments = (inputs, [30, 0, 31], torch.randn(num_tokens), dict(backend=backend))
    logps, gradients = whole(ranks.run(logps_and_gradients, *arguments, size=3))
    assert logps.shape == (num_tokens,) and (logps == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_a_token_that_is_ignored_as_padding(ranks):
    """ignore_index may be a token of the vocabulary, of which a shard has a row with another number."""
    inputs = make_inputs(30, 61, 16, ignored=False)
    inputs["labels"][::3] = 35
    inputs["labels"][1::3] = 5
    check(ranks, inputs, [30, 31], ignore_index=35)


def test_masked_vocabulary(ranks):
    """A whole shard may be taken out of the softmax by a bias of -inf."""
    inputs = make_inputs(19, 75, 24, bias=True)
    with torch.no_grad():
        inputs["bias"][40:] = float("-inf")
        inputs["labels"].clamp_(max=39)
    dlogps = torch.randn(19)
    logps, gradients = whole(ranks.run(logps_and_gradients, on_cpu(inputs), [40, 35], dlogps, {}, size=2))
    shorter = {name: value if name in ("hidden_states", "labels") else value[:40] for name, value in inputs.items()}
    shorter = {name: value.cpu() for name, value in shorter.items()}
    torch.testing.assert_close(logps, linear_logps(**shorter).detach())
    assert (gradients["lm_head_weight"][40:] == 0).all() and gradients["hidden_states"].isfinite().all()


def test_equal_calls_give_equal_bits(ranks):
    inputs, dlogps = on_cpu(make_inputs(37, 301, 70, torch.bfloat16)), torch.randn(37)
    first, second = (ranks.run(logps_and_gradients, inputs, [76, 76, 76, 73], dlogps, {}) for _ in range(2))
    for (logps, gradients), (logps_again, gradients_again) in zip(first, second, strict=True):
        assert torch.equal(logps, logps_again)
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def under_autocast(group, *arguments):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return logps_and_gradients(group, *arguments)


def test_autocast_rounds_nothing(ranks):
    arguments = (on_cpu(make_inputs(18, 65, 24)), [30, 35], torch.randn(18), {})
    plain, cast = (ranks.run(function, *arguments, size=2) for function in (logps_and_gradients, under_autocast))
    for (logps, gradients), (cast_logps, cast_gradients) in zip(plain, cast, strict=True):
        assert torch.equal(logps, cast_logps)
        assert all(torch.equal(gradients[name], cast_gradients[name]) for name in gradients)


def frozen_parts(group, inputs, sizes, trained):
    mine = shard_of(group, inputs, sizes, requires_grad=False)
    mine[trained].requires_grad_()
    logps = parallel_linear_logps(**mine, group=group)
    return torch.autograd.grad(logps.sum(), mine[trained])[0]


def test_only_one_gradient(ranks):
    inputs = on_cpu(make_inputs(18, 65, 24, bias=True))
    everything = ranks.run(logps_and_gradients, inputs, [30, 35], torch.ones(18), {}, size=2)
    for trained in ("hidden_states", "lm_head_shard", "bias"):
        for gradient, (_, gradients) in zip(
            ranks.run(frozen_parts, inputs, [30, 35], trained, size=2), everything, strict=True
        ):
            if trained == "hidden_states":  # of a frozen head, another schedule
                torch.testing.assert_close(gradient, gradients[trained])
            else:
                assert torch.equal(gradient, gradients[trained])


def bytes_sent(group, inputs, sizes, options):
    """What this rank puts into collectives on tensors, by their name."""
    sent, gather, reduce = dict(all_gather=0, all_reduce=0), dist.all_gather, dist.all_reduce

    def counted_gather(output, tensor, group):
        sent["all_gather"] += tensor.nbytes
        gather(output, tensor, group=group)

    def counted_reduce(tensor, group):
        sent["all_reduce"] += tensor.nbytes
        reduce(tensor, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted_gather)
        patch.setattr(dist, "all_reduce", counted_reduce)
        parallel_linear_logps(**shard_of(group, inputs, sizes), **options, group=group).sum().backward()
    return sent


@pytest.mark.parametrize("backend, bytes_per_token", [("torch", 24)] + [("triton", 12)] * INTERPRETING)
def test_what_travels(ranks, backend, bytes_per_token):
    """The volumes of docs/scaling.md: three numbers per token, and dX in float32."""
    inputs = on_cpu(make_inputs(20, 61, 16, torch.float16, ignored=False))
    for sent in ranks.run(bytes_sent, inputs, [30, 31], dict(backend=backend), size=2):
        assert sent == dict(all_gather=20 * bytes_per_token, all_reduce=20 * 16 * 4)


def test_shard_bounds():
    for vocab_size, world_size in ((301, 4), (5, 4), (2, 4), (128256, 8)):
        chunks = [len(chunk) for chunk in torch.arange(vocab_size).chunk(world_size)]
        bounds = [shard_bounds(vocab_size, world_size, rank) for rank in range(world_size)]
        assert [stop - start for start, stop in bounds] == chunks + [0] * (world_size - len(chunks))
        assert bounds[0][0] == 0 and all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    with pytest.raises(ValueError, match="0 <= rank < world_size, got 5, 4 and 4"):
        shard_bounds(5, 4, 4)


def dtensor_head(group, inputs, dlogps):
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = distribute_tensor(inputs["lm_head_weight"], mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(inputs["bias"], mesh, [Shard(0)]).requires_grad_()
    hidden_states = inputs["hidden_states"].requires_grad_()
    logps = parallel_linear_logps(hidden_states, weight, inputs["labels"], bias=bias)
    logps.backward(dlogps)
    assert weight.grad.placements == bias.grad.placements == (Shard(0),)
    gradients = dict(hidden_states=hidden_states.grad, lm_head_shard=weight.grad.to_local(), bias=bias.grad.to_local())
    return logps.detach(), gradients


@pytest.mark.parametrize("V", [75, 4])
def test_a_dtensor_knows_its_group(ranks, V):
    """V = 4 over 3 ranks leaves the last one without a row."""
    inputs, dlogps = on_cpu(make_inputs(19, V, 24, bias=True)), torch.randn(19)
    sizes = [stop - start for start, stop in (shard_bounds(V, 3, rank) for rank in range(3))]
    results = ranks.run(dtensor_head, inputs, dlogps, size=3)
    for ours, plain in zip(results, ranks.run(logps_and_gradients, inputs, sizes, dlogps, {}, size=3), strict=True):
        assert torch.equal(ours[0], plain[0])
        assert all(torch.equal(ours[1][name], plain[1][name]) for name in ours[1])


# What is refused


def badly_placed_head(group, placement, weight, hidden_states, labels):
    mesh = DeviceMesh.from_group(group, "cpu")
    if placement == "two dimensions":
        weight = distribute_tensor(weight, init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)])
    elif placement == "hidden_states":
        hidden_states, weight = distribute_tensor(hidden_states, mesh, [Shard(0)]), weight[:2]
    elif placement == "partial":
        weight = DTensor.from_local(weight, mesh, [Partial()])
    else:
        weight = distribute_tensor(weight, mesh, [Replicate() if placement == "replicated" else Shard(1)])
    parallel_linear_logps(hidden_states, weight, labels)


BAD_PLACEMENTS = {
    "replicated": r"must be placed as \(Shard\(0\),\).*got \(Replicate\(\),\)",
    "columns": r"must be placed as \(Shard\(0\),\).*got \(Shard\(dim=1\),\)",
    "partial": r"must be placed as \(Shard\(0\),\).*got \(Partial\(sum\),\)",
    "two dimensions": "one-dimensional mesh, got 2 dimensions",
    "hidden_states": "hidden_states must be a plain tensor, got a DTensor",
}


@pytest.mark.parametrize("placement", BAD_PLACEMENTS)
def test_placements_that_are_refused(ranks, placement):
    arguments = (placement, torch.randn(8, 4), torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    assert_all_match(ranks.errors(badly_placed_head, *arguments), BAD_PLACEMENTS[placement])


def assert_all_match(errors: list[str], message: str) -> None:
    for rank, error in enumerate(errors):
        assert re.search(message, error), f"rank {rank}: {error}"


def one_rank_differs(group, inputs, odd_rank, change):
    """The arguments of all ranks but for what `change` says of one."""
    mine = shard_of(group, inputs, [20, 20, 21])
    if dist.get_rank(group) == odd_rank:
        mine |= change
    parallel_linear_logps(**mine, group=group)


HEAD_DISAGREEMENTS = [
    (dict(softcap=30.0), r"ValueError: softcap must be the same on all ranks, got None on rank 0, 2; 30\.0 on rank 1"),
    (dict(temperature=0.5), r"temperature must be the same on all ranks, got 1\.0 on rank 0, 2; 0\.5 on rank 1"),
    (dict(ignore_index=0), r"ignore_index must be the same on all ranks"),
    (dict(bias=torch.zeros(20)), r"the use of bias must be the same on all ranks, got False on rank 0, 2; True on"),
    (dict(labels=torch.ones(8, dtype=torch.int64)), r"labels \(their checksum\) must be the same on all ranks"),
    (
        dict(hidden_states=torch.zeros(6, 4), labels=torch.zeros(6, dtype=torch.int64)),
        r"shape of hidden_states must be the same on all ranks, got \(8, 4\) on rank 0, 2; \(6, 4\) on rank 1",
    ),
    (dict(hidden_states=torch.zeros(8, 4)), r"gradient of hidden_states must be the same.*False on rank 1"),
    (dict(lm_head_shard=torch.zeros(20, 5)), r"lm_head_weight must have shape \(V, H\) = \(V, 4\), got \(20, 5\)"),
    (dict(lm_head_shard=torch.zeros(20, 4).double()), r"TypeError: lm_head_weight must be float32, got float64"),
    (dict(workspace_bytes=1), r"workspace_bytes must be at least"),
    (dict(temperature=-1.0), r"temperature must be positive and finite, got -1\.0"),
]


@pytest.mark.parametrize("change, message", HEAD_DISAGREEMENTS, ids=[row[1][:30] for row in HEAD_DISAGREEMENTS])
def test_ranks_that_disagree(ranks, change, message):
    """All of them hear of it, by the rank's number, and the group works on."""
    inputs = dict(hidden_states=torch.randn(8, 4), lm_head_weight=torch.randn(61, 4), labels=torch.arange(8))
    errors = ranks.errors(one_rank_differs, inputs, 1, change, size=3)
    assert_all_match(errors, message)
    if "same on all ranks" not in errors[0]:
        assert all("rank 1 refused its arguments" in errors[rank] for rank in (0, 2))
    ranks.run(one_rank_differs, inputs, 1, {}, size=3)


def test_labels_past_the_last_shard(ranks):
    inputs = dict(hidden_states=torch.randn(2, 4), lm_head_weight=torch.randn(61, 4), labels=torch.tensor([60, 61]))
    errors = ranks.errors(one_rank_differs, inputs, 1, {}, size=3)
    assert_all_match(errors, r"labels must lie in \[0, 61\) or be ignore_index = -100, got 61 at index 1")


def wrong_group(group, which):
    wrong = init_device_mesh("cpu", (2, 2)) if which == "mesh" else "tp"
    parallel_linear_logps(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64), group=wrong)


@pytest.mark.parametrize(
    "which, message", [("name", "TypeError: group must be a ProcessGroup.*got str"), ("mesh", "one-dimensional")]
)
def test_groups_that_are_refused(ranks, which, message):
    assert_all_match(ranks.errors(wrong_group, which), message)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="group needs torch.distributed.init_process_group"):
        parallel_linear_logps(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64))

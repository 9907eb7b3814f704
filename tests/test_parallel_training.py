"""The contrast over ranks, FSDP2 and DDP with the fused loss, both dimensions of a mesh, and processes that die."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import copg_kernels
from copg_kernels import linear_copg_loss, linear_logps, parallel, sequence_logps
from copg_kernels.parallel import gather_rows, gathered, parallel_copg_loss, parallel_linear_logps
from copg_kernels.reference import copg_coefficients_ref, copg_loss_ref
from tests.numerics import relative_error
from tests.ranks import Ranks

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.stop()


def assert_all_match(errors: list[str], message: str) -> None:
    for rank, error in enumerate(errors):
        assert re.search(message, error), f"rank {rank}: {error}"


# The contrast


def contrast(group, completions, sizes, options):
    """Loss and the gradient of this rank's log-probs."""
    rank = dist.get_rank(group)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    logps, *others = (values[rows] for values in completions)
    if "group_ids" in options:
        options = options | dict(group_ids=options["group_ids"][rows])
    logps.requires_grad_()
    loss = parallel_copg_loss(logps, *others, **options, group=group)
    loss.backward()
    return loss.detach(), logps.grad


def completions_of(num: int, dtype=torch.float64) -> list:
    return list(torch.randn(3, num, dtype=dtype) * torch.tensor([[30.0], [30.0], [1.0]], dtype=dtype))


SIZES = {
    "a completion each": [1, 1, 1, 1],
    "a group crosses each border": [3, 6, 3],
    "whole groups": [4, 8],
    "uneven, and a rank without any": [5, 0, 2, 1],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_groups_over_ranks(ranks, sizes, dtype):
    completions = completions_of(sum(sizes), dtype)
    options = dict(beta=0.1, group_size=4)
    results = ranks.run(contrast, completions, sizes, options, size=len(sizes))
    wide = [values.double() for values in completions]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert relative_error(results[0][0], copg_loss_ref(*wide, **options)) < tolerance
    assert all(torch.equal(loss, results[0][0]) and loss.dtype == dtype for loss, _ in results)
    gradient = torch.cat([gradient for _, gradient in results])
    assert relative_error(gradient, copg_coefficients_ref(*wide, **options)) < tolerance


def test_groups_by_number(ranks):
    """Rank r has one completion of each prompt, and groups are ragged."""
    completions, group_ids = completions_of(9), torch.tensor([7, 7, -1, 7, 3, -1, 3, 3, -1])
    results = ranks.run(contrast, completions, [3, 2, 4], dict(beta=0.1, group_ids=group_ids), size=3)
    order = torch.tensor([2, 5, 8, 4, 6, 7, 0, 1, 3])
    in_order = [values[order] for values in completions]
    cu_groups = torch.tensor([0, 3, 6, 9])
    assert relative_error(results[0][0], copg_loss_ref(*in_order, beta=0.1, cu_groups=cu_groups)) < 1e-13
    gradient = torch.cat([gradient for _, gradient in results])[order]
    assert relative_error(gradient, copg_coefficients_ref(*in_order, beta=0.1, cu_groups=cu_groups)) < 1e-13


def one_rank_differs(group, odd_rank, change):
    arguments = dict(zip(("logps", "ref_logps", "rewards"), torch.randn(3, 4), strict=True), beta=0.1, group_size=2)
    if dist.get_rank(group) == odd_rank:
        arguments |= change
    return parallel_copg_loss(**arguments, group=group)


CONTRAST_DISAGREEMENTS = [
    (dict(group_size=4), r"group_size must be the same on all ranks, got 2 on rank 0, 1; 4 on rank 2"),
    (dict(beta=0.2), r"beta must be the same on all ranks, got 0\.1 on rank 0, 1; 0\.2 on rank 2"),
    (dict(logps=torch.zeros(4).double()), r"dtype of logps must be the same .*torch\.float64 on rank 2"),
    (dict(group_size=None, group_ids=torch.zeros(4, dtype=torch.int64)), r"must be the same .*None on rank 2"),
    (dict.fromkeys(("logps", "ref_logps", "rewards"), torch.zeros(3)), r"must divide .*11, got 2 .*0: 4, 1: 4, 2: 3"),
    (dict(ref_logps=torch.zeros(3)), r"ref_logps must have shape \(N\,\).* = \(4,\), got \(3,\)"),
    (dict(rewards=torch.tensor([0.0, float("nan"), 0.0, 0.0])), r"rewards must be finite, got nan at index 1"),
    (dict(beta=-1.0), r"beta must be positive and finite, got -1\.0"),
    (dict(group_size=1), r"group_size must be at least 2"),
    (dict(group_size=None), r"group_size or group_ids must be given, and not both; got neither"),
    (dict(group_ids=torch.zeros(4, dtype=torch.int64)), r"group_size or group_ids must be given, .*; got both"),
    (dict(group_size=None, group_ids=torch.zeros(4)), r"TypeError: group_ids must be int64, got float32"),
    (dict(rewards=torch.zeros(4, requires_grad=True)), r"rewards must not require a gradient.*pass rewards\.detach"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", CONTRAST_DISAGREEMENTS, ids=[row[1][:30] for row in CONTRAST_DISAGREEMENTS])
def test_ranks_that_disagree(ranks, change, message):
    errors = ranks.errors(one_rank_differs, 2, change, size=3)
    assert_all_match(errors, message)
    if "same on all ranks" not in errors[0] and "per rank" not in errors[0]:
        assert all("rank 2 refused its arguments" in errors[rank] for rank in (0, 1))
    assert len({loss.item() for loss in ranks.run(one_rank_differs, 2, {}, size=3)}) == 1


def test_a_prompt_with_one_completion(ranks):
    options = dict(beta=0.1, group_ids=torch.tensor([0, 1, 0, 2]))
    errors = ranks.errors(contrast, completions_of(4), [2, 2], options, size=2)
    assert_all_match(errors, r"group_ids must give every prompt at least two completions, got one for \[1, 2\]")


# FSDP2 and DDP


class Policy(nn.Module):
    """A body, a head, and a forward pass that ends in the loss, so that a wrapper's hooks see the head too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(53, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.lm_head = nn.Linear(16, 53, bias=False)
        if tied:
            self.lm_head.weight = self.body[0].weight

    def forward(self, batch: dict, group=None) -> torch.Tensor:
        return loss_of(self.body(batch["input_ids"]), self.lm_head.weight, batch, group)


def loss_of(hidden_states, lm_head_weight, batch, group=None):
    """With a group, of prompts whose completions span its ranks; times their number, because wrappers average."""
    completions, options = (batch["ref_logps"], batch["rewards"]), dict(beta=0.1, group_size=2)
    if group is None:
        return linear_copg_loss(hidden_states, lm_head_weight, batch["labels"], *completions, **options).loss
    logps = sequence_logps(linear_logps(hidden_states, lm_head_weight, batch["labels"]), batch["labels"])
    return dist.get_world_size(group) * parallel_copg_loss(logps, *completions, **options, group=group)


def losses_and_parameters(policy, loss_on, batch, steps=3):
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        loss = loss_on(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
    return losses, {name: whole(x.detach()) for name, x in policy.named_parameters()}


def train_wrapped(group, recipe, policy, batch, spread):
    """On this rank's part of the batch."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batch = {name: values.chunk(size)[rank] for name, values in batch.items()}
    spread_over, mesh = group if spread else None, DeviceMesh.from_group(group, "cpu")
    loss_on = lambda batch: policy(batch, spread_over)
    if recipe == "DDP":
        wrapped = DistributedDataParallel(policy, process_group=group)
        loss_on = lambda batch: wrapped(batch, spread_over)
    elif recipe == "FSDP2, the loss in forward":
        fully_shard(policy.body[1], mesh=mesh)
        fully_shard(policy, mesh=mesh)
    else:
        fully_shard(policy.body, mesh=mesh)
        fully_shard(policy.lm_head, mesh=mesh)
        head = lambda: gathered(policy.lm_head.weight)
        loss_on = lambda batch: loss_of(policy.body(batch["input_ids"]), head(), batch, spread_over)
    return losses_and_parameters(policy, loss_on, batch)


def batch_of(num: int) -> dict:
    labels = torch.randint(53, (num, 5))
    labels[::3, 3:] = -100
    completions = dict(ref_logps=torch.randn(num).double() - 20, rewards=torch.randn(num).double())
    return dict(input_ids=torch.randint(53, (num, 5)), labels=labels, **completions)


@pytest.mark.parametrize("recipe", ["DDP", "FSDP2, the loss in forward", "FSDP2, the head gathered"])
@pytest.mark.parametrize("spread", [False, True], ids=["whole groups", "groups over ranks"])
def test_three_steps_equal_those_of_one_process(ranks, recipe, spread):
    """53 rows over two ranks, a tied head where the wrapper can keep it tied."""
    policy, batch = Policy(tied="gathered" not in recipe).double(), batch_of(6 if spread else 8)
    results = ranks.run(train_wrapped, recipe, policy, batch, spread, size=2)
    losses, parameters = losses_and_parameters(policy, policy, batch)
    assert losses[-1] < losses[0]
    mean = torch.tensor([ours for ours, _ in results], dtype=torch.float64).mean(0) / (2 if spread else 1)
    assert relative_error(mean, torch.tensor(losses, dtype=torch.float64)) < 1e-12
    for _, ours in results:
        assert ours.keys() == parameters.keys()
        for name, truth in parameters.items():
            assert relative_error(ours[name], truth) < 1e-12, name


def gathered_head(group, weight, layout, dtype):
    if layout == "plain":
        whole = gathered(weight.requires_grad_(), dtype)
    else:
        flat = layout == "sharded"
        mesh = DeviceMesh.from_group(group, "cpu") if flat else init_device_mesh("cpu", (2, 2))
        weight = distribute_tensor(weight, mesh, [Shard(0)] if flat else [Replicate(), Shard(0)]).requires_grad_()
        whole = gathered(weight, dtype)
    assert type(whole) is torch.Tensor
    (whole * (1 + 2.0**-7 * dist.get_rank(group))).sum().backward()
    gradient = weight.grad
    return whole.detach(), gradient if layout == "plain" else gradient.full_tensor()


@pytest.mark.parametrize("layout", ["sharded", "sharded and replicated", "plain"])
def test_gathered_is_the_whole_weight_and_its_gradient_the_mean(ranks, layout):
    """In bfloat16 the sum of these four gradients, 4.046875, would be rounded to 4.03125 or 4.0625."""
    weight = torch.randn(6, 3)
    results = ranks.run(gathered_head, weight, layout, torch.bfloat16)
    for rank, (whole, gradient) in enumerate(results):
        assert torch.equal(whole, weight.bfloat16())
        expected = 1 + 2.0**-7 * (rank if layout == "plain" else 1.5)
        assert gradient.dtype == torch.float32 and (gradient == expected).all()


def gather_partial(group):
    gathered(DTensor.from_local(torch.zeros(4, 3), DeviceMesh.from_group(group, "cpu"), [Partial()]))


def test_gathered_refuses(ranks):
    assert_all_match(
        ranks.errors(gather_partial, size=2), r"ValueError: lm_head_weight must be sharded .*got Partial\(sum\)"
    )
    with pytest.raises(TypeError, match="lm_head_weight must be a tensor, got list"):
        gathered([1.0])


def weighted_rows(group, rows, num_rows):
    """The rows of all ranks, and the gradient of one's own where row i of all counts i times."""
    rank = dist.get_rank(group)
    own = rows.split(num_rows)[rank].requires_grad_()
    gathered_rows = gather_rows(own, num_rows, group=group)
    (gathered_rows * torch.arange(len(rows))[:, None]).sum().backward()
    return gathered_rows.detach(), own.grad


@pytest.mark.parametrize("num_rows", [[2, 2, 2], [0, 5, 1], [6, 0, 0]], ids=str)
def test_gathered_rows_are_all_rows_and_the_gradient_is_of_ones_own(ranks, num_rows):
    rows = torch.randn(6, 3)
    results = ranks.run(weighted_rows, rows, num_rows, size=3)
    assert all(torch.equal(all_rows, rows) for all_rows, _ in results)
    assert torch.equal(torch.cat([gradient for _, gradient in results]), torch.arange(6.0)[:, None].expand(6, 3))


def gather_other_numbers(group, num_rows):
    gather_rows(torch.zeros(2, 3), num_rows, group=group)


@pytest.mark.parametrize("num_rows", [[2], [2, 2, 2], [1, 1]], ids=str)
def test_gather_rows_refuses_other_numbers(ranks, num_rows):
    errors = ranks.errors(gather_other_numbers, num_rows, size=2)
    assert_all_match(errors, r"ValueError: num_rows must have a number for each of 2 ranks, and 2 for rank \d, got")


# The recipes of docs/scaling.md

RECIPES = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
SAME_BATCH, FUSED, SPREAD, ROWS, IN_FORWARD, GATHERED = range(6)


def run_recipe(group, number, policy, batch):
    """-> the loss of this rank, and the head's gradient in full."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = (
        batch if number in (SAME_BATCH, FUSED) else {name: values.chunk(size)[rank] for name, values in batch.items()}
    )
    # Where a recipe leaves the body to its reader, and a leaf for the head.
    given = dict(hidden_states=policy.body(mine["input_ids"]), lm_head_weight=policy.lm_head.weight, model=policy)
    given |= dict(mesh=DeviceMesh.from_group(group, "cpu"), nn=nn, fully_shard=fully_shard, **mine)
    scope = vars(copg_kernels) | vars(parallel) | given
    exec(RECIPES[number], scope)
    gradient = scope["lm_head_shard"].grad if number in (SAME_BATCH, FUSED) else policy.lm_head.weight.grad
    return scope["loss"].item(), gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipes(ranks, number):
    policy, batch = Policy(tied=False).double(), batch_of(6 if number == SPREAD else 8)
    losses, gradients = zip(*ranks.run(run_recipe, number, policy, batch, size=2), strict=True)
    loss = policy(batch)
    loss.backward()
    gold = policy.lm_head.weight.grad
    assert abs(sum(losses) / 2 - loss.item()) < 1e-12 * abs(loss.item())
    if number in (SAME_BATCH, FUSED):
        assert relative_error(torch.cat(gradients), gold) < 1e-12
    elif number in (SPREAD, ROWS):
        assert relative_error(sum(gradients) / 2, gold) < 1e-12
    else:
        assert all(relative_error(gradient, gold) < 1e-12 for gradient in gradients)


# Data-parallel times vocabulary-parallel


def loss_on_a_mesh(group, hidden_states, weight, labels, completions):
    """Completions over the first dimension of a 2 x 2 mesh, the vocabulary over the second."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = mesh["dp"].get_local_rank()
    hidden_states = hidden_states.chunk(2)[mine].requires_grad_()
    shard = distribute_tensor(weight, mesh["tp"], [Shard(0)]).requires_grad_()
    labels = labels.chunk(2)[mine]
    per_token_logps = parallel_linear_logps(hidden_states, shard, labels)
    mine_of_each = [values.chunk(2)[mine] for values in completions]
    options = dict(beta=0.1, group_size=2, group=mesh["dp"])
    loss = parallel_copg_loss(sequence_logps(per_token_logps, labels), *mine_of_each, **options)
    loss.backward()
    return loss.detach(), hidden_states.grad, shard.grad.full_tensor()


def test_both_dimensions_of_a_mesh(ranks):
    hidden_states, weight = torch.randn(6, 5, 16).double(), torch.randn(53, 16).double()
    labels, completions = torch.randint(53, (6, 5)), torch.randn(2, 6).double()
    results = ranks.run(loss_on_a_mesh, hidden_states, weight, labels, completions)
    hidden_states.requires_grad_(), weight.requires_grad_()
    batch = dict(labels=labels, ref_logps=completions[0], rewards=completions[1])
    loss = loss_of(hidden_states, weight, batch)
    loss.backward()
    for rank, (ours, dhidden, dweight) in enumerate(results):
        assert relative_error(ours, loss.detach()) < 1e-13
        assert relative_error(dhidden, hidden_states.grad.chunk(2)[rank // 2]) < 1e-12
        assert relative_error(dweight + results[(rank + 2) % 4][2], weight.grad) < 1e-12


# A rank that dies or never comes


def leave_the_others(group, how, moment):
    hidden_states = torch.randn(6, 8, requires_grad=True)
    shard, labels = torch.randn(5, 8, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    if moment == "backward":
        logps = parallel_linear_logps(hidden_states, shard, labels, group=group)
    if dist.get_rank(group) == 1:
        os._exit(1) if how == "dies" else time.sleep(3)
        return
    if moment == "forward":
        logps = parallel_linear_logps(hidden_states, shard, labels, group=group)
    logps.sum().backward()


@pytest.mark.parametrize("how, moment", [("dies", "forward"), ("dies", "backward"), ("stalls", "backward")])
def test_a_rank_that_leaves_ends_the_others(tmp_path, how, moment):
    pool = Ranks(2, tmp_path / "store", seconds=1)
    try:
        (kind, error), (other, _) = pool.outcomes(leave_the_others, how, moment)
    finally:
        pool.stop()
    assert kind == "raised" and re.search("by peer|[Tt]imed out", error), error
    assert other == ("died" if how == "dies" else "returned")

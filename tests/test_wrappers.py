"""What a fused loss returns, through everything that takes a module's output apart and puts it together again."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from copg_kernels import CoPGLoss, CoPGOutput, linear_copg_loss
from tests.conftest import DEVICE

N, L, H, V = 4, 3, 16, 97


class Policy(nn.Module):
    """A layer, a head, and a layer that takes no part."""

    def __init__(self, sparse_eps: float | None, idle: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.idle = nn.Linear(H, H) if idle else None
        self.loss = CoPGLoss(beta=0.3, group_size=2, sparse_eps=sparse_eps, return_entropy=sparse_eps is None)

    def forward(self, features, labels, ref_logps, rewards):
        return self.loss(self.head.weight, self.body(features), labels, ref_logps, rewards)


def batch() -> tuple[torch.Tensor, ...]:
    labels = torch.randint(V, (N, L), device=DEVICE)
    return torch.randn(N, L, H, device=DEVICE), labels, torch.randn(N, device=DEVICE), torch.randn(N, device=DEVICE)


FIELDS = ("loss", "logps", "regularized_rewards", "log_ratios", "gemm_units", "sparsity", "entropy")


def assert_same(actual: CoPGOutput, expected: CoPGOutput) -> None:
    assert type(actual) is CoPGOutput
    for name in FIELDS:
        value, other = getattr(actual, name), getattr(expected, name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(value, other) and value.dtype == other.dtype, name
        elif other is None:
            assert value is None, name
        else:
            assert type(value) is type(other) and all(torch.equal(*pair) for pair in zip(value, other, strict=True))


@pytest.fixture(params=[None, 1e-3], ids=["exact", "sparse"])
def sparse_eps(request):
    return request.param


@pytest.fixture
def output(sparse_eps):
    return Policy(sparse_eps).to(DEVICE)(*batch())


REBUILT = {
    "pytree": lambda output: pytree.tree_map(lambda x: x, output),
    "flattened": lambda output: pytree.tree_unflatten(*pytree.tree_flatten(output)),
    "_replace": lambda output: output._replace(loss=output.loss),
    "by fields": lambda output: type(output)(*output),
    "by names": lambda output: type(output)(**output._asdict()),
    "FSDP1": lambda output: torch.distributed.utils._apply_to_tensors(lambda x: x, output),
    "copied": lambda output: copy.copy(output),
}


@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_rebuilt(rebuild, output):
    assert_same(rebuild(output), output)


def test_pickled(output):
    detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, output)
    assert_same(pickle.loads(pickle.dumps(detached)), detached)


def test_accelerate_keeps_it_whole(output):
    utils = pytest.importorskip("accelerate.utils")
    assert_same(utils.recursively_apply(lambda x: x, output), output)
    assert_same(utils.send_to_device(output, DEVICE), output)


def test_names_and_places(output, sparse_eps):
    loss, logps, regularized_rewards, log_ratios, *_ = output
    assert loss is output.loss and logps is output.logps
    assert regularized_rewards is output.regularized_rewards and log_ratios is output.log_ratios
    assert output.gemm_units.device == loss.device and int(output.gemm_units) in (1, 3)
    assert (output.sparsity is None) == (sparse_eps is None) and (output.entropy is None) == (sparse_eps is not None)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("idle", [False, True], ids=["all take part", "an idle layer"])
@pytest.mark.parametrize("options", [dict(), dict(find_unused_parameters=True), dict(static_graph=True)], ids=str)
def test_ddp(options, idle, sparse_eps, one_process):
    if idle and not options:
        pytest.skip("DDP itself wants to be told of layers that take no part")
    policy, given = Policy(sparse_eps, idle).to(DEVICE), batch()
    expected = policy(*given)
    expected.loss.backward()
    gradients = [None if x.grad is None else x.grad.clone() for x in policy.parameters()]
    policy.zero_grad()
    wrapped = DistributedDataParallel(policy, **options)
    for _ in range(2):  # static_graph learns in its first step
        output = wrapped(*given)
        assert_same(output, expected)
        policy.zero_grad()
        output.loss.backward()
    for x, gradient in zip(policy.parameters(), gradients, strict=True):
        assert x.grad is None or not x.grad.any() if gradient is None else torch.equal(x.grad, gradient)


def test_fsdp2(sparse_eps, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # On the CPU, where gloo gathers.
    policy, given = Policy(sparse_eps), [x.cpu() for x in batch()]
    expected = policy(*given)
    output = fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))(*given)
    assert_same(output, expected)
    output.loss.backward()
    assert all(x.grad is not None for x in policy.parameters())


def test_compiled(sparse_eps):
    policy, given = Policy(sparse_eps).to(DEVICE), batch()
    expected, output = policy(*given), torch.compile(policy, backend="aot_eager")(*given)
    assert type(output) is CoPGOutput and output.gemm_units == expected.gemm_units
    torch.testing.assert_close(output.loss, expected.loss)
    assert (output.entropy is None) == (expected.entropy is None)


def test_checkpointed():
    from torch.utils.checkpoint import checkpoint

    features, *others = batch()
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    options = dict(beta=0.3, group_size=2)
    plain = linear_copg_loss(features, weight, *others, **options)
    again = checkpoint(lambda w: linear_copg_loss(features, w, *others, **options), weight, use_reentrant=False)
    assert_same(again, plain)
    pair = [torch.autograd.grad(output.loss, weight)[0] for output in (again, plain)]
    assert torch.equal(*pair)

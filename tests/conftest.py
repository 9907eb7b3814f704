"""Where the tests run, from which seed, and what fresh memory holds."""

import os
import zlib

import torch

# Before anything imports Triton: without a GPU the kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nor does a test see what was tuned on the machine it runs on.
os.environ["COPG_TUNED"] = "off"

import pytest

from copg_kernels.kernels import blocks
from copg_kernels.kernels.language import INTERPRETING, triton
from tests import interpreter

if INTERPRETING:
    interpreter.install()

# Under xdist the workers share the cores; each would take all of them, and mostly wait for the others.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["torch"] + (["triton"] if DEVICE.type == "cuda" or INTERPRETING else [])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases", type=int, help="random calls per backend in tests/test_fuzz.py; a minute's by default"
    )
    parser.addoption("--audit-launches", action="store_true", help="audit every interpreted launch: tests/launches.py")
    parser.addoption("--blocks", help="interpret with the block table of another GPU, such as sm_90")
    parser.addoption("--fuzz-first", type=int, default=0, help="number of the first of them; each number is one case")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--blocks"):
        assert INTERPRETING, "a GPU has its own blocks"
        blocks.device_kind = lambda device: config.getoption("--blocks")


def pytest_report_header(config: pytest.Config) -> str:
    mode = "compiled"
    if INTERPRETING:
        mode = f"interpreted with blocks of {config.getoption('--blocks') or 'the interpreter'}"
    return f"torch {torch.__version__} on {DEVICE}, triton {triton.__version__ if triton else None} ({mode})"


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For tensors of a few hundred numbers: more threads would mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed_from_test_name(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def audited_launches():
    """Programs in any order, and nothing readable beside their tensors, where kernels are interpreted."""
    if not INTERPRETING:
        yield
        return
    from tests import launches

    with launches.audited():
        yield


@pytest.fixture(autouse=True)
def audited_if_asked_for(request):
    if request.config.getoption("--audit-launches"):
        request.getfixturevalue("audited_launches")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """Whatever a launcher allocates and no kernel writes comes out as NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if not torch.compiler.is_compiling() and tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))

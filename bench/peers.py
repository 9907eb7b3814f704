"""Libraries a user might pick instead: installed, called as their documentation says, and never vendored.

    pip install --no-deps -r bench/requirements-peers.txt

Each function takes the device and returns a provider, or raises ImportError with the reason there is none. Where a
package drags in a trainer to reach one file, that file is loaded with stubs in the trainer's place.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.inputs import BenchInputs
from bench.providers import Provider, composed

NO_CUTE = "needs nvidia-cutlass-dsl"


def load_trl(device: torch.device) -> Provider:
    """TRL's fused head: tiles of 4096 tokens by 32768 vocabulary entries, logits in the model's dtype."""
    folder = _installed("trl")
    # Its backward pass asks trl.trainer, which needs a training stack, for a context that only sharded heads use.
    _bare_package("trl.trainer", folder / "trainer")
    _stub("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: nullcontext())
    function = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    options = (1.0, 32768, None, 1.0)  # temperature, vocabulary tile, softcap, scale; then further outputs
    return composed(
        lambda hidden, weight, labels: function.apply(hidden, weight, None, labels, *options, ())[0],
        lambda hidden, weight, labels: function.apply(hidden, weight, None, labels, *options, ("entropy",))[:2],
    )


def load_liger_cute(device: torch.device) -> Provider:
    """Liger's CuTe kernel for Hopper, which is what its dispatcher insists on there."""
    _installed("liger_kernel")
    _require_gpu(device)
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise ImportError("needs a Hopper GPU")
    _installed("cutlass", NO_CUTE)
    module = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    options = (1.0, -100, 1, True)  # temperature, ignored label, token tiles a cluster, with the entropy
    return composed(
        lambda hidden, weight, labels: -function.apply(hidden, weight, labels),
        lambda hidden, weight, labels: _of_scaled_ce(function.apply(hidden, weight, labels, *options)),
    )


def load_liger_torch(device: torch.device) -> Provider:
    """The torch fallback of the same function: named here, because on Hopper its dispatcher never takes it."""
    _installed("liger_kernel")
    module = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module._FusedLinearPPOFallbackFunction
    return composed(
        lambda hidden, weight, labels: -function.apply(hidden, weight, labels, 1.0, -100, False),
        lambda hidden, weight, labels: _of_scaled_ce(function.apply(hidden, weight, labels, 1.0, -100, True)),
    )


def _of_scaled_ce(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies; the entropies come in the dtype of the hidden states, and are summed in fp32."""
    losses, entropy = outputs
    return -losses, entropy.float()


def load_liger_flce(device: torch.device) -> Provider:
    """Liger's Triton fused linear cross entropy, per token, its weight gradient summed in fp32."""
    _installed("liger_kernel")
    _require_gpu(device)
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    options = (None, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
    return composed(lambda hidden, weight, labels: -function.apply(hidden, weight, labels, *options)[0].float())


def load_verl(device: torch.device) -> Provider:
    folder = _installed("verl")
    _require_gpu(device)
    # The package imports Ray; its two kernel files want no more than these names of it.
    _bare_package("verl", folder)
    _bare_package("verl.utils", folder / "utils")
    _stub(
        "verl.utils.device",
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
        is_cuda_available=True,
    )
    function = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def logps_and_entropy(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logps, entropy = function(hidden_states, lm_head_weight, labels, 1.0, "none")
        # Times one, because it refuses the expanded gradient that a sum hands back; a product makes that a full one.
        return 1.0 * logps, 1.0 * entropy

    return composed(lambda *operands: logps_and_entropy(*operands)[0], logps_and_entropy)


def load_cce(device: torch.device) -> Provider:
    """Cut cross-entropy as it comes: gradient tiles whose softmax is negligible are dropped."""
    return _cut_cross_entropy(device, filter_eps="high")


def load_cce_exact(device: torch.device) -> Provider:
    return _cut_cross_entropy(device, filter_eps=None)


def _cut_cross_entropy(device: torch.device, filter_eps: str | None) -> Provider:
    _installed("cut_cross_entropy")
    _require_gpu(device)
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def token_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
        losses = function(hidden_states, lm_head_weight, labels, reduction="none", filter_eps=filter_eps)
        return -losses.float()

    return composed(token_logps)


def load_unsloth(device: torch.device) -> Provider:
    """AGPL, so measured from its installed file and imported by nothing else; the rest of it needs unsloth."""
    path = _installed("unsloth_zoo") / "fused_losses" / "fused_linear.py"
    name = "bench_unsloth_fused_linear"
    if name not in sys.modules:  # it registers custom operators, which can be done once
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    function = sys.modules[name].fused_linear_logprobs
    return composed(function, partial(function, return_entropy=True))


def load_flash_attn(device: torch.device) -> Provider:
    """Its Triton cross entropy on logits that exist: eager with a fused softmax."""
    _installed("flash_attn")
    _require_gpu(device)
    function = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss

    def token_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden_states, lm_head_weight)
        # In place where the logits are only needed for their gradient.
        return -function(logits, labels, inplace_backward=logits.requires_grad)[0]

    return composed(token_logps)


def load_quack(device: torch.device) -> Provider:
    """No peer but a ceiling: the mean of the tokens' cross entropies, whose gradient needs no second look."""
    _installed("quack")
    _require_gpu(device)
    _installed("cutlass", NO_CUTE)
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def mean_ce(inputs: BenchInputs) -> Tensor:
        hidden_states, labels = inputs.hidden_states, inputs.labels
        if inputs.counted is not None:
            hidden_states, labels = hidden_states[inputs.counted], labels[inputs.counted]
        return function(hidden_states, inputs.lm_head_weight, labels)

    return Provider(None, mean_ce)


def _installed(module: str, otherwise: str = "not installed") -> Path:
    """The folder of an installed package, without running it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(otherwise)
    return Path(next(iter(spec.submodule_search_locations)))


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ImportError("needs a GPU")


def _bare_package(name: str, folder: Path) -> None:
    """`name` as a package whose modules can be imported, without what its __init__ would import."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules.setdefault(name, module_from_spec(spec))


def _stub(name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    sys.modules.setdefault(name, module)

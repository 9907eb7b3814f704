"""What the Trainer runs on: the options and engines that a CoPGTrainer refuses, and a trap of accelerate's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments


def refuse_arguments(model: nn.Module, args: TrainingArguments, trainer_options: Mapping[str, Any]) -> None:
    if model is None or "model_init" in trainer_options:
        raise ValueError("model must be given, not model_init: it is the reference policy too")
    if args.n_gpu > 1:
        raise ValueError(
            f"a process must see one GPU, got {args.n_gpu}: start one for each (torchrun), or set CUDA_VISIBLE_DEVICES"
        )
    if args.torch_compile:
        raise ValueError("args.torch_compile must be off: the compiled module is the one with the head")
    if args.label_smoothing_factor:
        raise ValueError(f"args.label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError("model.config.output_router_logits must be False: the router's loss is not part of CoPG")
    if args.deepspeed:
        raise ValueError(
            "args.deepspeed must be off: how ZeRO gathers the head for the loss is not tested with CoPGTrainer; "
            "use FSDP2 (args.fsdp)"
        )
    if args.fsdp:
        _require_fsdp2((args.fsdp_plugin_args or {}).get("fsdp_version", 1))
    if args.world_size > 1:
        _refuse_data_loading(args)


def _refuse_data_loading(args: TrainingArguments) -> None:
    if not args.average_tokens_across_devices:
        raise ValueError("args.average_tokens_across_devices must be on: a step is the mean over all processes' groups")
    loading: Any = args.accelerator_config
    if loading.dispatch_batches:
        raise ValueError("accelerator_config must not set dispatch_batches: it would cut groups into pieces")
    if not loading.even_batches:
        raise ValueError("accelerator_config must not turn even_batches off: processes would wait for each other")


def refuse_engine(trainer: Trainer) -> None:
    """What is known when accelerate has read its own configuration too."""
    if trainer.is_deepspeed_enabled:
        raise ValueError("accelerate's configuration must not be DeepSpeed's; use FSDP2 (fsdp_version 2)")
    sizes = {"tp": trainer.get_tp_size(), "cp": trainer.get_cp_size(), "sp": trainer.get_sp_size()}
    if max(sizes.values()) > 1:
        raise ValueError(f"processes must share nothing but data and shards of weights, got sizes {sizes}")
    if trainer.is_fsdp_enabled:
        _require_fsdp2(trainer.accelerator.state.fsdp_plugin.fsdp_version)


def _require_fsdp2(version: int) -> None:
    if version != 2:
        raise ValueError(
            f"fsdp_config must have version 2, got {version}: the head's weight is part of a flat one there"
        )


def wrap_evaluated_model(trainer: Trainer) -> None:
    """Before training. accelerate marks a model that was evaluated first as prepared and does not wrap it in DDP later:
    each process would train a policy of its own, in silence.
    """
    if trainer.args.world_size > 1 and trainer.model_wrapped is trainer.model:
        trainer.model._is_accelerate_prepared = False

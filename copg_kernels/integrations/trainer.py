"""CoPG in the Trainer of transformers.

from transformers import TrainingArguments
from copg_kernels.integrations.trainer import CoPGTrainer

rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "rewards": [1.0, 0.0, 0.5]}]
args = TrainingArguments("run", per_device_train_batch_size=8, num_train_epochs=1)
CoPGTrainer(model, args, beta=0.1, train_dataset=rows, processing_class=tokenizer).train()
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from copg_kernels import linear_copg_loss, linear_logps, sequence_logps
from copg_kernels.integrations.collator import GroupCollator
from copg_kernels.integrations.group_metrics import group_metrics, mean_over_groups
from copg_kernels.integrations.references import WithReferences, restore_references, save_references
from copg_kernels.integrations.transformers import HeadInputs, hidden_states_of, read_head


class CoPGTrainer(Trainer):
    """`transformers.Trainer` with `copg_kernels.linear_copg_loss`; the model's own head is never called.

    A sample of the Trainer is a group: one prompt with its completions and rewards (see `GroupCollator`). So
    per_device_train_batch_size counts prompts, no group is split, and the loss of a step is the mean over all its
    groups, however gradient accumulation cuts them.

    The reference is the policy that the trainer is given. Its log-probs of all training and evaluation rows are
    computed here, once, by the same kernels, in the order and batches of the data; rows that bring ref_logps keep them.
    Checkpoints hold them, so that a resumed run keeps its reference whatever model it is built with. The dropout of the
    model is set to 0: a policy that is not a function of its weights has no log-ratio.

    Logged in training and evaluation, besides the loss: log_ratio, log_ratio_margin and accuracy of
    `copg_kernels.integrations.group_metrics`.

    Args:
        model: a causal model of transformers, or a PeftModel of one, that `read_head` accepts.
        args: TrainingArguments of one process with at most one GPU.
        beta: strength of the pull towards the reference, > 0, in units of reward per nat.
        average_logps: mean instead of sum over a completion's tokens.
        sparse_eps: as in `linear_logps`.
        trainer_options: all else that Trainer takes: train_dataset, eval_dataset (indexable, with a length),
            processing_class (the tokenizer), data_collator, callbacks, ...

    Raises:
        TypeError, ValueError: what `read_head`, `GroupCollator` and `linear_copg_loss` refuse; datasets without a
            length, model_init, several processes or GPUs, torch_compile, a router's auxiliary loss, label smoothing.

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        beta: float,
        average_logps: bool = False,
        sparse_eps: float | None = None,
        **trainer_options: Any,
    ) -> None:
        _refuse(model, args, trainer_options)
        trainer_options.setdefault("data_collator", GroupCollator(trainer_options.get("processing_class")))
        trainer_options.setdefault("compute_metrics", _evaluation_metrics)
        super().__init__(model, args, **trainer_options)
        # With a count of groups in every step, this keeps the Trainer from dividing by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.beta, self.average_logps, self.sparse_eps = beta, average_logps, sparse_eps
        self._metrics_since_log: list[Tensor] = []
        _set_dropout_to_zero(self.model)
        self._add_references()
        self.add_callback(_SaveReferences(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """Mean over the batch's groups, or their share of a step of num_items_in_batch groups."""
        if "ref_logps" not in inputs:
            raise ValueError("rows must have ref_logps: give the trainer its evaluation sets when it is made")
        group_sizes = inputs["group_sizes"]
        hidden_states, head = self._head_inputs(model, inputs)
        output = linear_copg_loss(
            hidden_states,
            head.lm_head_weight,
            inputs["labels"],
            inputs["ref_logps"],
            inputs["rewards"],
            beta=self.beta,
            cu_groups=nn.functional.pad(group_sizes.cumsum(0), (1, 0)).int(),
            cu_seqlens=inputs["cu_seqlens"],
            average_logps=self.average_logps,
            sparse_eps=self.sparse_eps,
            **head.options(),
        )
        metrics = group_metrics(output.log_ratios, inputs["rewards"], group_sizes)
        if model.training:
            self._metrics_since_log.append(metrics)
        loss = output.loss if num_items_in_batch is None else output.loss * (len(group_sizes) / num_items_in_batch)
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, int]:
        """The micro-batches of a step, and how many groups they hold."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, sum(len(batch["group_sizes"]) for batch in batches)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of the batch, metrics of its groups in place of logits, and their sizes in place of labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs["metrics"], inputs["group_sizes"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics_since_log:
            logs |= mean_over_groups(torch.cat(self._metrics_since_log))
            self._metrics_since_log.clear()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            restore_references(Path(folder), self._references())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """What the Trainer leaves in a row: the collator's columns, not the arguments of the model's forward."""
        self._signature_columns = ["prompt", "completions", "rewards", "ref_logps"]

    def _head_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, HeadInputs]:
        """States (T, H) that predict the completions' tokens."""
        with self.accelerator.autocast():
            states = hidden_states_of(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return states.flatten(0, 1).index_select(0, inputs["positions"]), read_head(model)

    def _add_references(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._with_references(self.train_dataset, self.args.train_batch_size)
        size = self.args.eval_batch_size
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {name: self._with_references(rows, size) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_references(self.eval_dataset, size)

    @torch.no_grad()
    def _with_references(self, rows: Any, batch_size: int) -> WithReferences:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(f"data sets must have a length and be indexable, got {type(rows).__name__}")
        self.model.eval()
        ref_logps: list[list[float]] = []
        batches = DataLoader(rows, batch_size, collate_fn=self.data_collator)
        for inputs in tqdm(batches, desc="reference log-probs", disable=self.args.disable_tqdm):
            inputs = self._prepare_inputs(inputs)
            logps = inputs["ref_logps"] if "ref_logps" in inputs else self._logps(inputs)
            ref_logps += [part.tolist() for part in logps.split(inputs["group_sizes"].tolist())]
        return WithReferences(rows, ref_logps)

    def _logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) log-probs of the completions under the policy as it is now."""
        hidden_states, head = self._head_inputs(self.model, inputs)
        per_token_logps = linear_logps(hidden_states, head.lm_head_weight, inputs["labels"], **head.options())
        return sequence_logps(
            per_token_logps, inputs["labels"], cu_seqlens=inputs["cu_seqlens"], average=self.average_logps
        )

    def _references(self) -> dict[str, WithReferences]:
        named = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        found = {"train": self.train_dataset} | {f"eval {name}": rows for name, rows in named.items()}
        return {name: rows for name, rows in found.items() if rows is not None}


class _SaveReferences(TrainerCallback):
    """Beside every checkpoint the reference it was trained against."""

    def __init__(self, trainer: CoPGTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        save_references(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.trainer._references())


def _evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return mean_over_groups(torch.as_tensor(prediction.predictions))


def _refuse(model: nn.Module, args: TrainingArguments, trainer_options: Mapping[str, Any]) -> None:
    if model is None or "model_init" in trainer_options:
        raise ValueError("model must be given, not model_init: it is the reference policy too")
    if args.world_size > 1 or args.n_gpu > 1:
        got = f"{args.world_size} processes and {args.n_gpu} GPUs"
        raise ValueError(f"args must be of one process that sees at most one GPU (CUDA_VISIBLE_DEVICES), got {got}")
    if args.torch_compile:
        raise ValueError("args.torch_compile must be off: the compiled module is the one with the head")
    if args.label_smoothing_factor:
        raise ValueError(f"args.label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError("model.config.output_router_logits must be False: the router's loss is not part of CoPG")


def _set_dropout_to_zero(model: nn.Module) -> None:
    """`nn.Dropout`, and the rates that attention modules keep for `scaled_dot_product_attention`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)

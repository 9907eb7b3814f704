"""CoPG in the Trainer of transformers.

from transformers import TrainingArguments
from copg_kernels.integrations.trainer import CoPGTrainer

rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "rewards": [1.0, 0.0, 0.5]}]
args = TrainingArguments("run", per_device_train_batch_size=8, num_train_epochs=1)
CoPGTrainer(model, args, beta=0.1, train_dataset=rows, processing_class=tokenizer).train()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from copg_kernels import linear_copg_loss, linear_logps, sequence_logps
from copg_kernels.integrations.collator import GroupCollator, first_groups
from copg_kernels.integrations.group_metrics import group_metrics, mean_over_groups, means, totals
from copg_kernels.integrations.in_forward import call_in_forward
from copg_kernels.integrations.references import ReferencesCallback, WithReferences, find_references, restore_references
from copg_kernels.integrations.trainer_engine import refuse_arguments, refuse_engine, wrap_evaluated_model
from copg_kernels.integrations.transformers import HeadInputs, read_head


class CoPGTrainer(Trainer):
    """`transformers.Trainer` with `copg_kernels.linear_copg_loss`; the model's own head is never called.

    A sample of the Trainer is a group: one prompt with its completions and rewards (see `GroupCollator`). So
    per_device_train_batch_size counts prompts, no group is split, and the loss of a step is the mean over all its
    groups, however gradient accumulation and processes cut them.

    The reference is the policy that the trainer is given. Its log-probs of all training and evaluation rows are
    computed once, by the same kernels, in the order and batches of the data, spread over the processes: here, or with
    FSDP2 when training begins, where the model is first sharded. Rows that bring ref_logps keep them. Checkpoints hold
    them, so that a resumed run keeps its reference whatever model it is built with. The dropout of the model is set to
    0: a policy that is not a function of its weights has no log-ratio.

    Started by torchrun or accelerate it trains with DDP, or with FSDP2 where args.fsdp is on, and the loss is computed
    inside of the wrapped model's forward. Losses, gradients and metrics are those of one process with the batches of
    all: rows that the Trainer repeats to fill the last batch are left out.

    Logged in training and evaluation, besides the loss: log_ratio, log_ratio_margin, accuracy and, unless sparse_eps is
    given, entropy, of `copg_kernels.integrations.group_metrics`.

    Args:
        model: a causal model of transformers, or a PeftModel of one, that `read_head` accepts.
        args: TrainingArguments; at most one GPU per process.
        beta: strength of the pull towards the reference, > 0, in units of reward per nat.
        average_logps: mean instead of sum over a completion's tokens.
        sparse_eps: as in `linear_logps`.
        trainer_options: all else that Trainer takes: train_dataset, eval_dataset (indexable, with a length),
            processing_class (the tokenizer), data_collator, callbacks, ...

    Raises:
        TypeError, ValueError: what `read_head`, `GroupCollator` and `linear_copg_loss` refuse; datasets without a
            length, model_init, torch_compile, a router's auxiliary loss, label smoothing; several GPUs in a process,
            DeepSpeed, FSDP1, tensor, context or sequence parallelism, dispatch_batches, even_batches or
            average_tokens_across_devices turned off.

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
        refuse_arguments(model, args, trainer_options)
        trainer_options.setdefault("data_collator", GroupCollator(trainer_options.get("processing_class")))
        trainer_options.setdefault("compute_metrics", _evaluation_metrics)
        super().__init__(model, args, **trainer_options)
        refuse_engine(self)
        # With a count of groups in every step, this keeps the Trainer from dividing by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.beta, self.average_logps, self.sparse_eps = beta, average_logps, sparse_eps
        self._metrics_since_log: list[Tensor] = []
        _set_dropout_to_zero(self.model)
        self._wrap_data_sets()
        if not self.is_fsdp_enabled:
            with self.accelerator.autocast():
                read_head(self.model)
            self._find_references()
        self.add_callback(ReferencesCallback(self._find_references, self._references))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean over the batch's groups, or their share of a step of num_items_in_batch groups of all processes."""
        if "ref_logps" not in inputs:
            raise ValueError("rows must have ref_logps: give the trainer its evaluation sets when it is made")
        group_sizes = inputs["group_sizes"]

        def loss_of(hidden_states: Tensor, head: HeadInputs) -> dict[str, Tensor | None]:
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
                return_entropy=self.sparse_eps is None,
                **head.options(),
            )
            return dict(loss=output.loss, log_ratios=output.log_ratios, entropy=output.entropy)

        output = self._in_forward(model, inputs, loss_of)
        num_groups, entropy = inputs.get("num_groups", len(group_sizes)), output["entropy"]
        if entropy is not None:
            entropy = sequence_logps(entropy, inputs["labels"], cu_seqlens=inputs["cu_seqlens"], average=True)
        metrics = group_metrics(output["log_ratios"], inputs["rewards"], group_sizes, entropy)[:num_groups]
        if model.training:
            self._metrics_since_log.append(metrics)
        loss = output["loss"]
        if num_items_in_batch is not None:
            # The engine averages over processes.
            loss = loss * (num_groups * self.args.world_size / num_items_in_batch)
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | None]:
        """The micro-batches of a step, and how many groups those of all processes hold."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        batches[-1] = self._without_repeats(batches[-1])
        num_groups = sum(batch.get("num_groups", len(batch["group_sizes"])) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(num_groups, device=self.args.device), "sum")

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of the batch, metrics of its groups in place of logits, and their sizes in place of labels."""
        inputs = self._prepare_inputs(inputs)
        group_sizes = inputs["group_sizes"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._without_repeats(inputs), return_outputs=True)
        metrics = outputs["metrics"]
        # What the Trainer gathers has a row per group of the batch; it drops those of repeated groups.
        missing = len(group_sizes) - len(metrics)
        metrics = nn.functional.pad(metrics, (0, 0, 0, missing), value=float("nan"))
        return (loss, None, None) if prediction_loss_only else (loss, metrics, group_sizes)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics_since_log:
            logs |= means(self.accelerator.reduce(totals(torch.cat(self._metrics_since_log)), "sum"))
            self._metrics_since_log.clear()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            restore_references(Path(folder), self._references())
        wrap_evaluated_model(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """What the Trainer leaves in a row: the collator's columns, not the arguments of the model's forward."""
        self._signature_columns = ["prompt", "completions", "rewards", "ref_logps"]

    def _in_forward(
        self, model: nn.Module, inputs: Mapping[str, Tensor], function: Callable[[Tensor, HeadInputs], Any]
    ) -> Any:
        """function of the states (T, H) that predict the completions' tokens, and of the head."""

        def of_completions(states: Tensor, head: HeadInputs) -> Any:
            return function(states.flatten(0, 1).index_select(0, inputs["positions"]), head)

        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            return call_in_forward(model, of_completions, **tokens)

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Of an epoch's last batch the groups that the data loader has not put there to fill it."""
        state, size = self.accelerator.gradient_state, len(inputs["group_sizes"])
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return inputs
        num_groups = min(max(state.remainder - self.args.process_index * size, 0), size)
        # A process without any computes one all the same, which counts for nothing: its forward is part of the others'.
        return {**first_groups(inputs, max(num_groups, 1)), "num_groups": num_groups}

    def _wrap_data_sets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = WithReferences(self.train_dataset)
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {name: WithReferences(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = WithReferences(self.eval_dataset)

    def _find_references(self) -> None:
        """Of the data sets that have none yet, under the policy as it is now."""
        self.model.eval()
        for name, rows in self._references().items():
            if rows.ref_logps is None:
                size = self.args.train_batch_size if name == "train" else self.args.eval_batch_size
                find_references(rows, size, self.data_collator, self._ref_logps, quiet=self.args.disable_tqdm)

    def _ref_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) those that the rows bring, or those of the policy."""
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        inputs = self._prepare_inputs(inputs)

        def logps_of(hidden_states: Tensor, head: HeadInputs) -> Tensor:
            return linear_logps(hidden_states, head.lm_head_weight, inputs["labels"], **head.options())

        per_token_logps = self._in_forward(self.model, inputs, logps_of)
        return sequence_logps(
            per_token_logps, inputs["labels"], cu_seqlens=inputs["cu_seqlens"], average=self.average_logps
        )

    def _references(self) -> dict[str, WithReferences]:
        named = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        found = {"train": self.train_dataset} | {f"eval {name}": rows for name, rows in named.items()}
        return {name: rows for name, rows in found.items() if rows is not None}


def _evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return mean_over_groups(torch.as_tensor(prediction.predictions))


def _set_dropout_to_zero(model: nn.Module) -> None:
    """`nn.Dropout`, and the rates that attention modules keep for `scaled_dot_product_attention`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)

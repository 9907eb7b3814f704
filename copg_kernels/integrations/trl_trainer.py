"""CoPG in TRL: the policy samples completions, reward functions score them, as in TRL's RLOO.

from copg_kernels.integrations.trl_trainer import CoPGConfig, CoPGTrainer

args = CoPGConfig("run", beta=0.05, num_generations=4, per_device_train_batch_size=8, num_iterations=2)
trainer = CoPGTrainer(model, reward, args=args, train_dataset=prompts, processing_class=tokenizer)
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import get_config_model_id, split_tensor_dict

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, linear_logps_and_entropy, sequence_logps
from copg_kernels.integrations.in_forward import Outputs, call_in_forward
from copg_kernels.integrations.trainer_engine import refuse_engine, wrap_evaluated_model
from copg_kernels.integrations.transformers import HeadInputs

# What they must be: a ratio to clip, a loss and wrappers that CoPGTrainer does not have.
_UNSUPPORTED = {
    "epsilon": RLOOConfig.epsilon,
    "epsilon_high": None,
    "normalize_advantages": False,
    "use_liger_kernel": False,
    "torch_compile": False,
    "deepspeed": None,
}


@dataclass
class CoPGConfig(RLOOConfig):
    """`trl.RLOOConfig` for `CoPGTrainer`, which supports its options but for the ones below.

    beta (> 0) is in units of reward per nat; num_generations is the size of a group. Dropout is off by default.

    Raises:
        ValueError: beta <= 0; per_device_train_batch_size (or the evaluation's) is not a multiple of num_generations;
            epsilon or epsilon_high (there is no ratio to clip), normalize_advantages, use_liger_kernel, torch_compile
            or deepspeed is set.
    """

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Without dropout: a policy that is not a function of its weights has no log-ratio."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        for name, unset in _UNSUPPORTED.items():
            if getattr(self, name) != unset:
                raise ValueError(f"{name} is not supported by CoPG: it must be {unset}, got {getattr(self, name)}")
        _require_whole_groups("train", self.per_device_train_batch_size, "num_generations", self.num_generations)
        if self.eval_strategy != "no":
            size = self.num_generations_eval or self.num_generations
            _require_whole_groups("eval", self.per_device_eval_batch_size, "num_generations_eval", size)


class CoPGTrainer(RLOOTrainer):
    """`trl.RLOOTrainer` with `copg_kernels.linear_copg_loss`; the logits never exist.

        A_i  = R_i - beta * (log pi(y_i) - log pi_ref(y_i))      R_i: weighted sum of reward_funcs
        loss = mean over prompts of Var(A) / (2 beta)            over the num_generations completions of a prompt

    log pi is that of the policy as it is now, at args.temperature, and differentiable; log pi_ref is computed once,
    when completions are sampled. The gradient of the first step on new completions is that of RLOO. In later ones
    (num_iterations, steps_per_generation, an old vLLM) RLOO clips importance ratios; CoPG has none and needs none.

    Several processes train with DDP, or with FSDP2 where args.fsdp is on; the loss is computed inside of the wrapped
    model's forward. Each process samples completions of its own prompts, per_device_train_batch_size of them, so the
    gradient is that of one process with the batches of all.

    Data, generation, rewards, the reference policy, LoRA (peft_config), callbacks and checkpoints are RLOOTrainer's,
    and so are the metrics: reward, reward_std, rewards/*, kl, entropy, completions/*, frac_reward_zero_std; there is no
    clip ratio to log. The loss is a variance: unlike RLOO's its value means something, and it is 0 at the optimal
    policy.

    Args:
        model: one that `read_head` accepts, or its name.
        args: a CoPGConfig.
        The others: as for RLOOTrainer.

    Raises:
        TypeError: args is another configuration.
        ValueError: what CoPGConfig and `read_head` refuse; a processor of images, the auxiliary loss of a router, a
            completion that no reward function scores, an infinite reward, a batch that splits a group; DeepSpeed,
            FSDP1, tensor, context or sequence parallelism.

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """

    _tag_names = ["trl", "copg"]
    _name = "CoPG"
    _paper = {
        "title": "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",
        "id": "2406.19185",
    }

    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(self, model: Any, reward_funcs: Any, args: CoPGConfig | None = None, **trainer_options: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CoPGConfig(f"{name.split('/')[-1]}-CoPG")
        if not isinstance(args, CoPGConfig):
            raise TypeError(f"args must be a CoPGConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, **trainer_options)
        refuse_engine(self)
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer: images are not supported by CoPGTrainer")
        if self.aux_loss_enabled:
            raise ValueError("router_aux_loss_coef must be 0.0: the router's loss is not part of CoPG")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        wrap_evaluated_model(self)
        return super().train(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """CoPG on TRL's own batch, relative to the policy that sampled it.

        With l = log pi(y) - log pi_old(y) and B = R - beta * (log pi_old(y) - log pi_ref(y)), A = B - beta * l. TRL has
        log pi_old, and of B the difference to the mean of the group's others, which is k / (k - 1) times that to the
        group's mean; a constant of the group is nothing to CoPG.
        """
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

        def loss_of(hidden_states: Tensor, labels: Tensor, head: HeadInputs) -> tuple[Tensor, Tensor]:
            weight, old_logps = head.lm_head_weight, inputs["old_logps"]
            rewards = inputs["advantages"] * ((group_size - 1) / group_size)
            contrast: dict[str, Any] = dict(beta=self.beta, group_size=group_size)
            options: dict[str, Any] = dict(temperature=self.temperature, **head.options())
            entropy: Tensor | None
            if self.mask_truncated_completions:
                # A truncated completion has no token left, which the fused loss refuses; as in RLOO its reward counts.
                options |= dict(expected_gradients="logps")
                per_token_logps, entropy = linear_logps_and_entropy(hidden_states, weight, labels, **options)
                loss = copg_loss(sequence_logps(per_token_logps, labels), old_logps, rewards, **contrast)
            else:
                options |= dict(contrast, return_entropy=True)
                output = linear_copg_loss(hidden_states, weight, labels, old_logps, rewards, **options)
                loss, entropy = output.loss, output.entropy
            assert entropy is not None
            return loss, torch.stack([entropy.detach().sum(), (labels != -100).sum()])

        num_labels = inputs["completion_ids"].size(1)
        loss, entropy = self._in_forward(model, loss_of, input_ids, attention_mask, num_labels)
        total, num_tokens = self.accelerator.reduce(entropy, "sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["entropy"].append(total / max(num_tokens, 1.0))
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **images: Any,
    ) -> tuple[Tensor, None, None]:
        """(B, logits_to_keep), which TRL asks of the policy and of the reference when completions are sampled."""

        def logps_of(hidden_states: Tensor, labels: Tensor, head: HeadInputs) -> Tensor:
            weight, temperature = head.lm_head_weight, self.temperature
            return linear_logps(hidden_states, weight, labels, temperature=temperature, **head.options())

        per_token_logps = [
            self._in_forward(model, logps_of, input_ids[rows], attention_mask[rows], logits_to_keep)
            for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids))
        ]
        return torch.cat(per_token_logps), None, None

    def _in_forward(
        self,
        model: nn.Module,
        function: Callable[[Tensor, Tensor, HeadInputs], Outputs],
        input_ids: Tensor,
        attention_mask: Tensor,
        num_labels: int,
    ) -> Outputs:
        """function(states that predict the last num_labels tokens, these tokens (-100 where masked), head)."""
        labels = input_ids.masked_fill(attention_mask == 0, -100)[:, -num_labels:]

        def of_completions(states: Tensor, head: HeadInputs) -> Outputs:
            return function(states[:, -num_labels - 1 : -1], labels, head)

        with self.accelerator.autocast():
            return call_in_forward(model, of_completions, input_ids=input_ids, attention_mask=attention_mask)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """RLOOTrainer's, which also shuffles the completions: here groups stay together."""
        if not self.model.training:
            _require_whole_groups("eval", len(generation_batch), "num_generations_eval", self.num_generations_eval)
            return self._generate_and_score_completions(generation_batch)
        num_slices = self.args.steps_per_generation
        if self._step % (num_slices * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(scored, num_slices)
        return self._buffered_inputs[self._step % num_slices]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        unscored = rewards_per_func.isnan().all(1)
        if unscored.any():
            raise ValueError(f"reward_funcs must score every completion, {int(unscored.sum())} got None from all")
        if rewards_per_func.isinf().any():
            raise ValueError("reward_funcs must return finite numbers, or None where one does not apply; got infinity")
        return rewards_per_func


def _require_whole_groups(mode: str, batch_size: int, name: str, group_size: int) -> None:
    if group_size < 2 or batch_size % group_size:
        raise ValueError(
            f"per_device_{mode}_batch_size must be a multiple of {name}, which is at least 2: the completions of a "
            f"prompt are contrasted in one batch; got {batch_size} and {group_size}"
        )

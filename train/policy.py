"""The policy of the summarisation experiment: a small GPT-2, its fine-tuning, its log-probs and its samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from copg_kernels import linear_logps, sequence_logps
from train.batch import Batch, Group, pack, step_indices
from train.documents import Document
from train.model import EOS_ID, PAD_ID, head_inputs
from train.optimize import descend
from train.sampling import sample_completions
from train.summarize_settings import Settings

# Prompts of one forward pass without gradients.
EVALUATION_BATCH = 128


def new_policy(settings: Settings, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Random weights, always the same ones. No dropout: log-ratios start at exactly zero."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=settings.max_prompt_tokens + settings.max_completion_tokens,
        n_embd=settings.hidden_size,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        # The same function as GPT-2's own gelu_new, as one operation instead of eight.
        activation_function="gelu_pytorch_tanh",
        pad_token_id=PAD_ID,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
    )
    return GPT2LMHeadModel(config).to(settings.torch_device)


def fine_tune(policy: PreTrainedModel, documents: Sequence[Document], settings: Settings) -> list[float]:
    """Supervised steps on body -> summary; the mean loss per token of each.

    The body's tokens are predicted as well, from its first one on: no pretraining has taught this model to read.
    """
    groups = [Group(d.prompt_ids[:1], [d.prompt_ids[1:] + d.summary_ids], [0.0]) for d in documents]

    def loss_at(step: int) -> Tensor:
        batch = [groups[i] for i in step_indices(step, len(groups), settings.sft_batch, seed=0)]
        return -token_logps(policy, pack(batch, PAD_ID, settings.torch_device), settings).mean()

    steps = descend(policy, loss_at, steps=settings.sft_steps, lr=settings.sft_lr, to_zero=True)
    return [loss for _, loss in tqdm(steps, "supervised fine-tuning", settings.sft_steps)]


def token_logps(policy: PreTrainedModel, batch: Batch, settings: Settings) -> Tensor:
    """(T,) log-probability of each completion token."""
    return linear_logps(*head_inputs(policy, batch, settings.torch_dtype), batch.labels)


@torch.no_grad()
def completion_logps(policy: PreTrainedModel, groups: Sequence[Group], settings: Settings) -> Tensor:
    """(N,) log-probability of each completion of the groups, EOS included where it has one."""
    policy.eval()
    logps = [
        sequence_logps(token_logps(policy, batch, settings), batch.labels, cu_seqlens=batch.cu_seqlens)
        for batch in batches(groups, settings)
    ]
    return torch.cat(logps).cpu()


def draw(
    policy: PreTrainedModel, documents: Sequence[Document], num_samples: int, settings: Settings, seed: int
) -> list[list[list[int]]]:
    """num_samples completions per document's prompt, at temperature 1."""
    drawn = []
    for start in range(0, len(documents), EVALUATION_BATCH):
        part = documents[start : start + EVALUATION_BATCH]
        # The same precision as completion_logps: samples must come from the distribution whose log-probs are taken.
        with torch.autocast(settings.device, dtype=settings.torch_dtype, enabled=settings.dtype != "float32"):
            drawn += sample_completions(
                policy,
                [document.prompt_ids for document in part],
                num_samples=num_samples,
                max_new_tokens=settings.max_completion_tokens,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                seed=seed + start,
            )
    return drawn


def batches(groups: Sequence[Group], settings: Settings) -> Iterator[Batch]:
    for start in range(0, len(groups), EVALUATION_BATCH):
        yield pack(groups[start : start + EVALUATION_BATCH], PAD_ID, settings.torch_device)

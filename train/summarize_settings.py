"""The sizes of the summarisation experiment: everything a result depends on but seeds and betas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    files_per_package: int  # sources read for docstrings
    validation_prompts: int  # for the curves and for choosing beta
    test_prompts: int  # for the final figures, disjoint from the former
    sft_share: float  # of the other prompts, for supervised fine-tuning; the rest is for preferences and policies

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_prompt_tokens: int
    max_completion_tokens: int
    device: str
    dtype: str  # of transformer (autocast) and head operands

    sft_steps: int
    sft_batch: int  # summaries per step
    sft_lr: float
    judged_samples: int  # of the policy per prompt, the best and the worst of which make a preference pair
    reward_epochs: int
    reward_batch: int  # pairs per step
    reward_lr: float

    data_prompts: int  # prompts of a seed's offline data, two pairs each
    steps: int
    pairs_per_step: int
    lr: float
    evaluate_every: int

    processes: int  # that train policies at the same time, one thread each

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


SIZES = {
    # Two CPU cores, nine minutes when they are idle.
    "tiny": Settings(
        files_per_package=1200,
        validation_prompts=64,
        test_prompts=256,
        sft_share=0.6,
        vocab_size=2048,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        max_prompt_tokens=32,
        max_completion_tokens=24,
        device="cpu",
        dtype="float32",
        sft_steps=700,
        sft_batch=32,
        sft_lr=2e-3,
        judged_samples=4,
        reward_epochs=2,
        reward_batch=32,
        reward_lr=3e-4,
        data_prompts=320,
        steps=80,
        pairs_per_step=8,
        lr=3e-4,
        evaluate_every=20,
        processes=2,
    ),
    # One GPU, meant for less than 8 minutes; not run on one yet.
    "small": Settings(
        files_per_package=5000,
        validation_prompts=128,
        test_prompts=512,
        sft_share=0.5,
        vocab_size=8192,
        hidden_size=384,
        num_layers=6,
        num_heads=6,
        max_prompt_tokens=96,
        max_completion_tokens=32,
        device="cuda",
        dtype="bfloat16",
        sft_steps=800,
        sft_batch=64,
        sft_lr=1e-3,
        judged_samples=4,
        reward_epochs=2,
        reward_batch=64,
        reward_lr=3e-4,
        data_prompts=1600,
        steps=200,
        pairs_per_step=32,
        lr=1e-4,
        evaluate_every=50,
        processes=4,
    ),
    # Seconds, to see that every part works; nothing is learned.
    "micro": Settings(
        files_per_package=40,
        validation_prompts=8,
        test_prompts=12,
        sft_share=0.5,
        vocab_size=400,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_prompt_tokens=16,
        max_completion_tokens=40,
        device="cpu",
        dtype="float32",
        sft_steps=5,
        sft_batch=8,
        sft_lr=1e-2,
        judged_samples=2,
        reward_epochs=1,
        reward_batch=8,
        reward_lr=1e-2,
        data_prompts=12,
        steps=2,
        pairs_per_step=4,
        lr=1e-2,
        evaluate_every=1,
        processes=1,
    ),
}

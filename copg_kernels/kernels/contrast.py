"""From token log-probabilities to the CoPG loss in one launch, one program per group of completions.

    logps_i = sum or mean of logp_t over the completion's counted tokens, summed in float64
    A_i     = rewards_i - beta * (logps_i - ref_logps_i)
    loss_g  = Var_unbiased(A) / (2 beta)
    coefficients_i = dloss / dlogp_t for every counted token t of completion i
                   = -(A_i - mean A) / ((k - 1) G)  [/ number of counted tokens, for means]

which is -(A_i - leave-one-out mean) / (k G) written without the O(k^2) loop. Everything per completion is computed in
float64, where a reward of 1e7 still tells its neighbours apart. Fixed order, every output written once.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl
from copg_kernels.kernels.merge_splits import merge_splits_fwd, merge_splits_fwd_torch
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.kernels.token_statistics import token_statistics_fwd, token_statistics_fwd_torch

BLOCK_T = 256
BLOCK_K = 32


class Completions(NamedTuple):
    """What is known of the completions besides their tokens."""

    cu_seqlens: Tensor  # (N + 1,) int32
    cu_groups: Tensor  # (G + 1,) int32
    ref_logps: Tensor  # (N,) of any floating-point dtype, like rewards
    rewards: Tensor  # (N,)
    beta: float
    average: bool
    num_groups: int
    """Groups the loss is a mean over: all of the batch's, also where these are only a chunk of them."""
    equal_sizes: tuple[int, int] | None = None
    """Tokens per completion and completions per group, where the host knows them to be all the same."""


class Contrast(NamedTuple):
    """The outputs, float32."""

    loss: Tensor  # ()
    logps: Tensor  # (N,)
    regularized_rewards: Tensor  # (N,)
    log_ratios: Tensor  # (N,)
    coefficients: Tensor  # (N,), dloss / dlogp of each token
    per_token_logps: Tensor  # (T,)
    lse: Tensor  # (2, T), with what its rounding left
    entropy: Tensor  # (T,), empty where the partials have no weighted sums


@jit
def _regularized(logps, ref_logps, rewards, beta):
    """float32 logps, and the others as they were given -> A and log-ratio in float64."""
    log_ratio = logps.to(tl.float64) - ref_logps.to(tl.float64)
    return rewards.to(tl.float64) - beta * log_ratio, log_ratio


@jit
def _contrast_kernel(
    per_token_logps_ptr,  # (T,) float32
    position_ptr,  # (T,) int64
    num_rows_ptr,  # (1,) int64
    cu_seqlens_ptr,  # (N + 1,) int32
    cu_groups_ptr,  # (G + 1,) int32
    ref_logps_ptr,  # (N,)
    rewards_ptr,  # (N,)
    group_losses_ptr,  # (G,) float64, out
    logps_ptr,  # (N,) float32, out
    regularized_rewards_ptr,  # (N,) float32, out
    log_ratios_ptr,  # (N,) float32, out
    coefficients_ptr,  # (N,) float32, out
    num_groups,
    beta,
    beta_rest,  # what a float32 leaves of beta
    AVERAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    first = tl.load(cu_groups_ptr + group)
    last = tl.load(cu_groups_ptr + group + 1)
    k = (last - first).to(tl.float64)
    wide_beta = tl.cast(beta, tl.float64) + tl.cast(beta_rest, tl.float64)

    # 1. The sum of each completion's log-probs, and its regularised reward.
    mean_reward = tl.zeros((), dtype=tl.float64)
    for i in range(first, last):
        end = tl.load(cu_seqlens_ptr + i + 1)
        token_sums = tl.zeros((BLOCK_T,), dtype=tl.float64)
        token_counts = tl.zeros((BLOCK_T,), dtype=tl.int32)
        for start in range(tl.load(cu_seqlens_ptr + i), end, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask_t = offs_t < end
            token_sums += tl.load(per_token_logps_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float64)
            if AVERAGE:
                position = tl.load(position_ptr + offs_t, mask=mask_t, other=0)
                token_counts += (mask_t & (position < num_rows)).to(tl.int32)
        logps = tl.sum(token_sums, 0)
        per_token = 1.0
        if AVERAGE:
            count = tl.sum(token_counts, 0).to(tl.float64)
            logps = logps / count
            per_token = (1.0 / count).to(tl.float32)
        # Rounded before the difference: at pi = pi_ref the stored ref_logps must cancel to exactly 0.
        logps = logps.to(tl.float32)
        regularized_reward, log_ratio = _regularized(
            logps, tl.load(ref_logps_ptr + i), tl.load(rewards_ptr + i), wide_beta
        )
        tl.store(logps_ptr + i, logps)
        tl.store(log_ratios_ptr + i, log_ratio.to(tl.float32))
        tl.store(regularized_rewards_ptr + i, regularized_reward.to(tl.float32))
        tl.store(coefficients_ptr + i, per_token)
        mean_reward += regularized_reward / k

    # 2. The group's baseline, loss and coefficients. The barrier makes step 1's stores visible to the whole program.
    tl.debug_barrier()
    square_sums = tl.zeros((BLOCK_K,), dtype=tl.float64)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < last
        # Once more from the log-probs, for regularized_rewards_ptr holds them rounded.
        regularized_rewards, _ = _regularized(
            tl.load(logps_ptr + offs_k, mask=mask_k, other=0.0),
            tl.load(ref_logps_ptr + offs_k, mask=mask_k, other=0.0),
            tl.load(rewards_ptr + offs_k, mask=mask_k, other=0.0),
            wide_beta,
        )
        centered = tl.where(mask_k, regularized_rewards - mean_reward, 0.0)
        square_sums += centered * centered
        per_token = tl.load(coefficients_ptr + offs_k, mask=mask_k, other=0.0)
        coefficients = per_token.to(tl.float64) * -centered / ((k - 1) * num_groups)
        tl.store(coefficients_ptr + offs_k, coefficients.to(tl.float32), mask=mask_k)
    tl.store(group_losses_ptr + group, tl.sum(square_sums, 0) / ((k - 1) * 2.0 * wide_beta))


def launch_options(hip: bool) -> dict[str, int]:
    """Compile options. Left alone, ptxas gives the kernel 40 registers, for an occupancy it cannot use, and spills."""
    options = dict(num_warps=4) | NO_FUSION
    return options if hip else options | dict(maxnreg=128)


def contrast_fwd(partials: Partials, rows: PackedRows, completions: Completions) -> Contrast:
    """Partials (S, R) of (T,) tokens in (N,) completions of (G,) groups -> loss, coefficients, log-probs."""
    new = partials.max.new_empty
    per_token_logps, lse = merge_splits_fwd(partials, rows)
    N, G = completions.rewards.numel(), completions.cu_groups.numel() - 1
    group_losses = new((G,), dtype=torch.float64)
    beta = ctypes.c_float(completions.beta).value
    logps, regularized_rewards, log_ratios, coefficients = (new((N,)) for _ in range(4))
    _contrast_kernel[(G,)](
        per_token_logps, rows.position, rows.num_rows,
        completions.cu_seqlens, completions.cu_groups, completions.ref_logps, completions.rewards,
        group_losses, logps, regularized_rewards, log_ratios, coefficients,
        completions.num_groups, beta, completions.beta - beta,
        AVERAGE=completions.average, BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, **launch_options(torch.version.hip is not None),
    )  # fmt: skip
    return Contrast(
        (group_losses.sum() / completions.num_groups).to(logps.dtype),
        logps,
        regularized_rewards,
        log_ratios,
        coefficients,
        per_token_logps,
        lse,
        new((0,)) if partials.weighted is None else token_statistics_fwd(partials, rows, per_token_logps).entropy,
    )


def contrast_fwd_torch(partials: Partials, rows: PackedRows, completions: Completions) -> Contrast:
    """Twin of `contrast_fwd`."""
    per_token_logps, lse = merge_splits_fwd_torch(partials, rows)
    sums = segment_sum(per_token_logps, completions.cu_seqlens)
    counts = torch.ones_like(sums)
    if completions.average:
        counts = segment_sum(rows.position < rows.num_rows, completions.cu_seqlens)
    logps = (sums / counts).to(per_token_logps.dtype)
    log_ratios = logps.double() - completions.ref_logps.double()
    regularized_rewards = completions.rewards.double() - completions.beta * log_ratios

    sizes = completions.cu_groups.diff().long()
    group = torch.repeat_interleave(sizes, output_size=logps.numel())
    means = segment_sum(regularized_rewards, completions.cu_groups) / sizes
    centered = regularized_rewards - means[group]
    # Integers times a Python number would be a float32.
    group_losses = segment_sum(centered**2, completions.cu_groups) / (sizes - 1) / (2 * completions.beta)
    coefficients = -centered / ((sizes - 1)[group] * completions.num_groups * counts)
    return Contrast(
        (group_losses.sum() / completions.num_groups).to(logps.dtype),
        logps,
        regularized_rewards.to(logps.dtype),
        log_ratios.to(logps.dtype),
        coefficients.to(logps.dtype),
        per_token_logps,
        lse,
        lse.new_empty(0)
        if partials.weighted is None
        else token_statistics_fwd_torch(partials, rows, per_token_logps).entropy,
    )


def segment_sum(values: Tensor, cu_segments: Tensor) -> Tensor:
    """(T,) values, (N + 1,) boundaries -> (N,) float64 sums; no segment disturbs the next, as in a running sum."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_segments.long(), axis=0)

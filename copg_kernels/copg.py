"""Contrastive policy gradient: sequence log-probabilities, the loss on them, and both fused with the head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from copg_kernels import checks
from copg_kernels.kernels.contrast import segment_sum
from copg_kernels.losses import separable
from copg_kernels.ops import linear_copg_op
from copg_kernels.schedules.sparse_softmax import Sparsity
from copg_kernels.schedules.tile_ops import accumulation_dtype


class CoPGOutput(NamedTuple):
    """What a fused loss returns, all but the loss detached.

    A plain NamedTuple, so that it passes whole through everything that takes a module's output apart and puts it
    together again: DDP, FSDP, DataParallel, accelerate, torch.compile, pytrees. Read it by name, or unpack it as
    `loss, logps, regularized_rewards, log_ratios, *_ = output`.
    """

    loss: Tensor
    """(), mean over groups, minus the entropy bonus where there is one."""
    logps: Tensor
    """(N,) log pi(y|x), in nats: summed over the completion's tokens, or averaged."""
    regularized_rewards: Tensor
    """(N,) A = rewards - beta * log_ratios."""
    log_ratios: Tensor
    """(N,) logps - ref_logps; their mean over samples of the policy estimates the KL divergence."""
    gemm_units: Tensor
    """() int64, head GEMMs of this loss with its gradients: 3 where whole groups fit the workspace, 4 recomputed; with
    sparse_eps 1, but for what `sparsity` calls overflow."""
    sparsity: Sparsity | None = None
    """What sparse_eps kept of the softmax: density, mass dropped per token, share of tokens computed exactly."""
    entropy: Tensor | None = None
    """The labels' shape, of each token's softmax, in nats, with return_entropy; 0 at ignored tokens."""
    mean_entropy: Tensor | None = None
    """(), over the counted tokens, with return_entropy or an entropy_coef. The loss without its bonus is
    loss + entropy_coef * mean_entropy."""


def sequence_logps(
    per_token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each completion: the sum (or mean) of its counted tokens' log-probabilities.

        logps[i] = sum_{t in completion i, labels[t] != ignore_index} per_token_logps[t]   [/ number of such t]

    Summed in float64 and rounded once: bfloat16 numbers near -1024 are 8 nats apart, float32 ones 1e-4.

    Args:
        per_token_logps: (B, L) padded, or (T,) packed; float32 or float64. The only differentiable argument.
        labels: same shape, int64.
        cu_seqlens: None for padded input; (N + 1,) int32 boundaries of the completions for packed input.
        average: divide by the number of counted tokens (Grinsztajn et al., https://arxiv.org/abs/2406.19188).
        ignore_index: label of tokens that do not count.

    Returns:
        (B,) or (N,), dtype of per_token_logps.

    Raises:
        TypeError, ValueError: shapes or dtypes disagree, cu_seqlens does not go from 0 to T without decreasing, or a
            completion has no counted token and average is set.

    Examples:
        >>> per_token_logps = torch.tensor([[-0.5, -1.0, -0.25], [-2.0, -1.5, 0.0]])
        >>> labels = torch.tensor([[7, 3, 1], [4, 1, -100]])
        >>> sequence_logps(per_token_logps, labels)
        tensor([-1.7500, -3.5000])
        >>> sequence_logps(per_token_logps, labels, average=True)
        tensor([-0.5833, -1.7500])
    """
    checks.check_token_logps(per_token_logps, labels, cu_seqlens)
    checks.check_flag("average", average)
    checks.check_ignore_index(ignore_index)
    counted = labels != ignore_index
    token_logps = per_token_logps.where(counted, 0.0).double()
    if cu_seqlens is None:
        sums, counts = token_logps.sum(1), counted.sum(1)
    else:
        checks.require_boundaries("cu_seqlens", cu_seqlens, labels.numel(), least_size=0)
        sums, counts = segment_sum(token_logps, cu_seqlens), segment_sum(counted, cu_seqlens)
    if average:
        checks.require_nonempty(counts)
        sums = sums / counts
    return sums.to(per_token_logps.dtype)


@separable
def copg_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
) -> Tensor:
    """Contrastive policy gradient over groups of completions of one prompt, in unit form.

        A_i  = rewards_i - beta * (logps_i - ref_logps_i)
        loss = mean over groups of  Var_unbiased(A) / (2 beta)  =  sum_{i > j} (A_i - A_j)^2 / (2 beta k (k - 1))

    Its gradient with respect to logps_i is -(A_i - mean_{j != i} A_j) / k over the number of groups: minus the
    leave-one-out (RLOO) policy gradient, but right for completions from any source, without importance weights. A
    group whose A_i agree, as they do for the optimal policy pi proportional to pi_ref exp(R / beta), gives none. The
    gradient's scale depends neither on beta nor on k. For k = 2 the paper sums over both members of the pair, which
    is twice this.

    Args:
        logps: (N,) floating point, log pi(y|x) in nats. The only differentiable argument.
        ref_logps: (N,), the same completions under the reference policy.
        rewards: (N,), any scale; adding a constant to a group changes nothing.
        beta: strength of the KL regulariser, > 0, in units of reward per nat.
        group_size: k >= 2 consecutive completions per prompt; divides N. It has no default, as another k is another
            loss.
        cu_groups: (G + 1,) int32 boundaries of ragged groups, instead of group_size.

    Returns:
        Scalar float32 (float64 for float64 logps).

    Raises:
        TypeError: a tensor is not floating point, or cu_groups is not int32.
        ValueError: shapes differ, neither or both of group_size and cu_groups are given, a group has fewer than two
            completions or does not fit N, rewards or ref_logps are not finite or require a gradient, or beta <= 0.

    Examples:
        >>> logps = torch.tensor([-3.0, -5.0], requires_grad=True)
        >>> loss = copg_loss(logps, torch.tensor([-3.0, -5.0]), torch.tensor([1.0, 0.0]), beta=0.5, group_size=2)
        >>> loss.item()
        0.5
        >>> torch.autograd.grad(loss, logps)[0]
        tensor([-0.5000,  0.5000])

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """
    checks.check_loss_inputs(logps, ref_logps, rewards, beta, group_size, cu_groups)
    # In float64: rewards around 1e7 are one apart in float32, and N numbers cost nothing.
    log_ratios = logps.double() - ref_logps.detach().double()
    regularized_rewards = rewards.detach().double() - beta * log_ratios
    if cu_groups is None:
        assert group_size is not None
        variances = regularized_rewards.view(-1, group_size).var(1, correction=1)
    else:
        sizes = cu_groups.diff().long()
        group = torch.repeat_interleave(sizes, output_size=logps.numel())
        means = segment_sum(regularized_rewards, cu_groups) / sizes
        variances = segment_sum((regularized_rewards - means[group]) ** 2, cu_groups) / (sizes - 1)
    return (variances.mean() / (2 * beta)).to(accumulation_dtype(logps.dtype))


def linear_copg_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average_logps: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    sparse_eps: float | None = None,
    return_entropy: bool = False,
    entropy_coef: float = 0.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> CoPGOutput:
    """`copg_loss` straight from hidden states and the language-model head, without the logits.

        loss = copg_loss(sequence_logps(linear_logps(hidden_states, lm_head_weight, labels)), ref_logps, rewards)

    One kernel turns the rows' statistics into token log-probabilities, completions, regularised rewards, the loss and
    every token's coefficient. The gradient reaches hidden_states, lm_head_weight and bias; see `copg_loss` for the
    equation. ref_logps that were computed by `linear_logps` and `sequence_logps` with the same options cancel exactly
    where the policy is still the reference.

    The gradients are computed along with the loss, from the logits of as many whole groups as fit workspace_bytes:
    three head GEMMs, two with a frozen head, one without gradients. They are kept until the backward pass in the dtype
    of hidden_states (float32 for float16), and the gradient of the head is summed in float32 where there are several
    chunks of groups. With a trainable head, a group whose logits exceed workspace_bytes makes it compute the whole
    batch's logits twice, and so does float16 on a GPU; gemm_units tells. With sparse_eps the gradients take little more
    than the loss, whatever the groups; `sparsity` tells what was kept.

    Args:
        hidden_states: (B, L, H) padded, or (T, H) packed with cu_seqlens.
        lm_head_weight: (V, H), same dtype.
        labels: (B, L) or (T,) int64, aligned with hidden_states; ignore_index on prompt and padding.
        ref_logps: (N,) floating point, under the reference policy; averaged if average_logps is set.
        rewards: (N,) floating point. The contrast is computed in float64.
        beta, group_size, cu_groups: as in `copg_loss`.
        cu_seqlens: (N + 1,) int32 boundaries of packed completions.
        average_logps: mean instead of sum over a completion's tokens; beta then weighs a nat per token.
        return_entropy: also each token's entropy, as `linear_logps_and_entropy` has it, at no GEMM more. Not together
            with sparse_eps: a compact softmax has lost the entropy.
        entropy_coef: strength of an entropy bonus: minus this times the mean entropy of all counted tokens is added to
            the loss, in nats per token. It takes no head GEMM more, but with a frozen head one where a group's logits
            exceed workspace_bytes. `output.mean_entropy` is there to be logged apart. Not together with sparse_eps.
        bias, logit_scale, softcap, temperature, ignore_index, sparse_eps, workspace_bytes, backend: as `linear_logps`.

    Returns:
        CoPGOutput: loss, logps, regularized_rewards, log_ratios, float32; gemm_units; sparsity and entropy where asked
        for.

    Raises:
        TypeError, ValueError: as `linear_logps`, `sequence_logps` and `copg_loss`, and where a completion has no
            counted token; on a GPU the values of tensors are checked by device assertions.
        NotImplementedError: under torch.func.grad and in forward-mode differentiation.

    Examples:
        Two completions, of three and of two tokens, where each of 8 tokens is as likely as the others:

        >>> hidden_states, lm_head_weight = torch.zeros(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[5, 2, 1], [3, 1, -100]])
        >>> ref_logps, rewards = torch.tensor([-6.0, -4.0]), torch.tensor([1.0, 0.0])
        >>> batch = (hidden_states, lm_head_weight, labels, ref_logps, rewards)
        >>> output = linear_copg_loss(*batch, beta=0.1, group_size=2)
        >>> output.logps
        tensor([-6.2383, -4.1589])
        >>> output.regularized_rewards
        tensor([1.0238, 0.0159])
        >>> round(output.loss.item(), 2)
        2.54

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """
    checks.check_head(hidden_states, lm_head_weight, labels, bias)
    checks.check_transforms(hidden_states, lm_head_weight, bias)
    checks.check_logit_options(logit_scale, softcap, temperature)
    checks.check_ignore_index(ignore_index)
    boundaries = checks.completion_boundaries(hidden_states, labels, cu_seqlens)
    num_sequences = boundaries.numel() - 1
    checks.check_completions(ref_logps, rewards, num_sequences, hidden_states.device)
    checks.check_beta(beta)
    groups = checks.group_boundaries(num_sequences, group_size, cu_groups, hidden_states.device)
    backend = checks.resolve_backend(backend, hidden_states)
    checks.check_sparse_eps(sparse_eps, hidden_states.dtype, backend)
    checks.check_return_entropy(return_entropy, sparse_eps)
    checks.check_entropy_coef(entropy_coef, sparse_eps)
    workspace = checks.check_workspace(workspace_bytes, hidden_states, labels.numel(), backend, lm_head_weight)
    checks.check_flag("average_logps", average_logps)
    trains = [checks.needs_gradient(x) for x in (hidden_states, lm_head_weight, bias)]
    loss, logps, regularized_rewards, log_ratios, _, _, _, entropy, *_, gemm_units, statistics = linear_copg_op(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        lm_head_weight,
        labels.reshape(-1),
        bias,
        ref_logps.detach(),
        rewards.detach(),
        boundaries,
        groups,
        [labels.shape[1], group_size] if cu_seqlens is None and group_size is not None else [],
        float(beta),
        average_logps,
        trains,
        return_entropy,
        float(entropy_coef),
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        None if sparse_eps is None else float(sparse_eps),
        workspace,
        backend,
    )
    return CoPGOutput(
        loss,
        logps,
        regularized_rewards,
        log_ratios,
        gemm_units,
        sparsity=None if sparse_eps is None else Sparsity(*statistics.unbind()),
        entropy=entropy.view(labels.shape) if return_entropy else None,
        mean_entropy=mean_of_counted(entropy, labels, ignore_index) if return_entropy or entropy_coef else None,
    )


def mean_of_counted(entropy: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(T,), 0 where ignored -> (); 0 where nothing counts."""
    num_counted = (labels != ignore_index).sum().clamp(min=1)
    return (entropy.sum(dtype=torch.float64) / num_counted).to(entropy.dtype)


class CoPGLoss(nn.Module):
    """`linear_copg_loss` as a module, with the argument order of the ecosystem's fused losses.

        output = CoPGLoss(beta=0.06, group_size=4)(lm_head.weight, hidden_states, labels, ref_logps, rewards)

    Args: the keyword options of `linear_copg_loss`, but bias, cu_seqlens and cu_groups, which belong to the batch.
    """

    def __init__(
        self,
        beta: float,
        group_size: int | None = None,
        average_logps: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        sparse_eps: float | None = None,
        return_entropy: bool = False,
        entropy_coef: float = 0.0,
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(
            beta=beta,
            group_size=group_size,
            average_logps=average_logps,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            sparse_eps=sparse_eps,
            return_entropy=return_entropy,
            entropy_coef=entropy_coef,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )

    def forward(
        self,
        lm_head_weight: Tensor,
        hidden_states: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        rewards: Tensor,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_groups: Tensor | None = None,
    ) -> CoPGOutput:
        """See `linear_copg_loss`; lm_head_weight comes first."""
        return linear_copg_loss(
            hidden_states,
            lm_head_weight,
            labels,
            ref_logps,
            rewards,
            bias=bias,
            cu_seqlens=cu_seqlens,
            cu_groups=cu_groups,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

"""More than one process: the head's vocabulary, the completions of a group, or the head's weight spread over ranks.

    parallel_linear_logps              each rank holds some rows of lm_head_weight and computes with these only
    parallel_linear_logps_and_entropy  the same, with the entropy of the whole vocabulary
    parallel_linear_copg_loss          the loss fused with such a head: a GEMM less than the loss of the log-probs
    parallel_copg_loss                 the completions of one prompt lie on several ranks; a few numbers of each travel
    gathered                           a head weight that FSDP2 shards, whole for one forward and backward pass
    gather_rows                        hidden states or log-probs of all ranks, with the gradient of one's own

All are collective: every rank of the group calls them, in the same order, in the forward and in the backward pass. What
ranks must agree on is compared first, so that a wrong call is an error on all of them and not a hang. A rank that dies
or never arrives ends the others with an error of torch.distributed after the process group's timeout (30 minutes for
gloo and 10 for NCCL, unless init_process_group or new_group is given another `timeout`).
"""

from copg_kernels.parallel.contrast import parallel_copg_loss
from copg_kernels.parallel.gather import gathered
from copg_kernels.parallel.head import parallel_linear_logps, parallel_linear_logps_and_entropy
from copg_kernels.parallel.linear_copg import parallel_linear_copg_loss
from copg_kernels.parallel.rows import gather_rows
from copg_kernels.parallel.shard import shard_bounds

__all__ = [
    "gather_rows",
    "gathered",
    "parallel_copg_loss",
    "parallel_linear_copg_loss",
    "parallel_linear_logps",
    "parallel_linear_logps_and_entropy",
    "shard_bounds",
]

"""Contrastive policy gradient, and the losses around it, fused with the language-model head."""

from copg_kernels import losses
from copg_kernels.copg import (
    CoPGLoss,
    CoPGOutput,
    copg_loss,
    linear_copg_loss,
    sequence_logps,
)
from copg_kernels.linear_logps import (
    LinearTokenStatistics,
    linear_logps,
    linear_logps_and_entropy,
    linear_token_statistics,
)
from copg_kernels.sequence_loss import linear_sequence_loss

__version__ = "0.1.0"
__all__ = [
    "CoPGLoss",
    "CoPGOutput",
    "LinearTokenStatistics",
    "copg_loss",
    "linear_copg_loss",
    "linear_logps",
    "linear_logps_and_entropy",
    "linear_sequence_loss",
    "linear_token_statistics",
    "losses",
    "sequence_logps",
]

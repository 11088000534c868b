"""The FIPO loss as pure tensor functions: no Megatron, no process groups."""

from megatron_fipo.loss.advantage import group_advantage, overlong_penalty
from megatron_fipo.loss.config import FipoConfig
from megatron_fipo.loss.fipo import FipoOutput, fipo_loss
from megatron_fipo.loss.metrics import LossStatistics
from megatron_fipo.loss.normalization import loss_scale

__all__ = [
    "FipoConfig",
    "FipoOutput",
    "LossStatistics",
    "fipo_loss",
    "group_advantage",
    "loss_scale",
    "overlong_penalty",
]

"""The FIPO loss as pure tensor functions: no Megatron, no process groups."""

from megatron_fipo.loss.advantage import group_advantage, overlong_penalty
from megatron_fipo.loss.config import FipoConfig
from megatron_fipo.loss.correction import CorrectionConfig, correction_metrics, importance_correction
from megatron_fipo.loss.fipo import FipoOutput, fipo_loss
from megatron_fipo.loss.metrics import LossStatistics
from megatron_fipo.loss.normalization import loss_scale

__all__ = [
    "CorrectionConfig",
    "FipoConfig",
    "FipoOutput",
    "LossStatistics",
    "correction_metrics",
    "fipo_loss",
    "group_advantage",
    "importance_correction",
    "loss_scale",
    "overlong_penalty",
]

"""The losses as pure tensor functions: no Megatron, no process groups."""

from megatron_fipo.loss.advantage import AdvantageConfig, group_advantage, overlong_penalty
from megatron_fipo.loss.config import FipoConfig, LossConfig, RatioConfig
from megatron_fipo.loss.correction import CorrectionConfig, correction_metrics, importance_correction
from megatron_fipo.loss.fipo import FipoOutput, fipo_loss
from megatron_fipo.loss.metrics import LossStatistics
from megatron_fipo.loss.normalization import loss_scale
from megatron_fipo.loss.output import LossOutput
from megatron_fipo.loss.penalties import with_penalties
from megatron_fipo.loss.policy_gradient import ratio_loss

__all__ = [
    "AdvantageConfig",
    "CorrectionConfig",
    "FipoConfig",
    "FipoOutput",
    "LossConfig",
    "LossOutput",
    "LossStatistics",
    "RatioConfig",
    "correction_metrics",
    "fipo_loss",
    "group_advantage",
    "importance_correction",
    "loss_scale",
    "overlong_penalty",
    "ratio_loss",
    "with_penalties",
]

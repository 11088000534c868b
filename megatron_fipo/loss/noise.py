"""What an error in log-probs does to FIPO: the error of d, of the future KL F and of the weight f, against their edges.

Two log-probs make d = logp - old_logp, and F sums d over the tokens that follow, so an error of d with mean b and
standard deviation s reaches F, far from the end of a response, as

    b / (1 - gamma)  and, where errors of neighbouring tokens are independent,  s / sqrt(1 - gamma^2)

and is seen where it is not small against the edges of f: ln(weight_high) and ln(weight_low).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fipo.loss.config import FipoConfig
from megatron_fipo.loss.fipo import influence_weight
from megatron_fipo.loss.metrics import RatioTerms
from megatron_fipo.ops.reference import reference_discounted_scan

CHANGED = 0.01  # a weight counts as changed beyond this: a hundredth of the token's gradient


@dataclass(frozen=True)
class Responses:
    """Packed responses without their log-probs.

    response_mask_T: bool [T]; cu_seqlens_S1: int [S + 1]; advantage_S: fp32 [S].
    """

    response_mask_T: Tensor
    cu_seqlens_S1: Tensor
    advantage_S: Tensor

    def terms(self, logp_T: Tensor, old_logp_T: Tensor, config: FipoConfig) -> "Terms":
        """What the loss makes of log-probs, of response tokens alone, fp32 [R]."""
        ratios = RatioTerms(logp_T, old_logp_T, self.advantage_S, self.response_mask_T, self.cu_seqlens_S1)
        d_T = ratios.log_ratio_T
        x_T = torch.where(d_T <= math.log(config.dual_clip), d_T, 0.0)
        F_T = reference_discounted_scan(x_T.double(), self.cu_seqlens_S1, config.gamma).to(d_T.dtype)
        f_T = influence_weight(F_T, d_T.exp(), ratios.advantage_T, config)
        return Terms(*(value_T[ratios.mask_T] for value_T in (d_T, F_T, f_T)))


@dataclass(frozen=True)
class Terms:
    """d, F and f of response tokens, fp32 [R]."""

    d_R: Tensor
    F_R: Tensor
    f_R: Tensor


def spread(error: Tensor) -> dict[str, float]:
    """Mean, standard deviation, 99th percentile and maximum of the size."""
    size = error.abs()
    return {
        "mean": error.mean().item(),
        "std": error.std().item(),
        "p99": size.kthvalue(math.ceil(0.99 * len(size))).values.item(),
        "max": size.max().item(),
    }


def compare(found: Terms, expected: Terms, config: FipoConfig) -> dict[str, float | dict[str, float]]:
    """How far d, F and f are off, and the shares of tokens that a clip treats otherwise.

    Returns:
        d, F, f: `spread` of the error; ratio_clip: share of tokens that are on the other side of an edge of the
        ratio's clip; weight_edge: the same for the edges of f; weight_changed: share with f off by more than CHANGED.
    """

    def side(values: Tensor, low: float, high: float) -> Tensor:
        return (values >= high).int() - (values <= low).int()

    low, high = 1 - config.clip_low, 1 + config.clip_high
    edges = config.weight_low, config.weight_high
    return {
        "d": spread(found.d_R - expected.d_R),
        "F": spread(found.F_R - expected.F_R),
        "f": spread(found.f_R - expected.f_R),
        "ratio_clip": _share(side(found.d_R.exp(), low, high) != side(expected.d_R.exp(), low, high)),
        "weight_edge": _share(side(found.f_R, *edges) != side(expected.f_R, *edges)),
        "weight_changed": _share((found.f_R - expected.f_R).abs() > CHANGED),
    }


def budget(error_T: Tensor, responses: Responses, config: FipoConfig, half_life: float) -> dict[str, float]:
    """The error of F that an error of d causes, with F's decay of another half-life.

    Args:
        error_T: of d, fp32 [T].

    Returns:
        rms: measured, over response tokens; independent: what independent errors of this mean and spread would give in
        the same responses; long: what they give far from the end of a response; edge: the nearer edge of f, or, if it
        has one edge at 1, the other; rms and long in units of `edge` are what to look at.
    """
    gamma = replace(config, half_life=half_life).gamma
    mask_T, cu_seqlens_S1 = responses.response_mask_T, responses.cu_seqlens_S1
    error_R = error_T[mask_T].double()
    mean, std = error_R.mean().item(), error_R.std().item()

    def summed(values_T: Tensor, decay: float) -> Tensor:
        return reference_discounted_scan(torch.where(mask_T, values_T.double(), 0.0), cu_seqlens_S1, decay)[mask_T]

    ones_T = torch.ones_like(error_T)
    independent_R = (mean * summed(ones_T, gamma)).square() + std**2 * summed(ones_T, gamma**2)
    return {
        "half_life": half_life,
        "rms": summed(error_T, gamma).square().mean().sqrt().item(),
        "independent": independent_R.mean().sqrt().item(),
        "long": math.hypot(mean / (1 - gamma), std / math.sqrt(1 - gamma**2)),
        "edge": weight_edge(config),
    }


def weight_edge(config: FipoConfig) -> float:
    """The |F| at which f stops following: the smaller of |ln weight_low|, ln weight_high that is not 0."""
    edges = [abs(math.log(edge)) for edge in (config.weight_low, config.weight_high) if edge > 0]
    return min((edge for edge in edges if edge > 0), default=math.inf)


def _share(happens: Tensor) -> float:
    return happens.double().mean().item()

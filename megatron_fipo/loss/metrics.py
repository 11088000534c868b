"""What the released code logs about a loss, as statistics that merge exactly over micro-batches and ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_fipo.loss.config import FipoConfig, LossConfig
from megatron_fipo.ops.fused_loss import EXTREMA
from megatron_fipo.ops.fused_loss import SUMS as TOKEN_SUMS
from megatron_fipo.ops.packed import expand_to_tokens

MAX_LOG_RATIO = 20.0  # d is clamped to +- this
MAX_FUTURE_KL = 80.0  # exp saturates there, so that an unbounded weight times a ratio stays finite in fp32

# Histograms of d = log r have bins of equal width in asinh(d / 1e-3): fine where most tokens are, relative further out.
# A quantile read from them is off by at most half a bin, |error of log r| <= 0.0013 sqrt(log(r)^2 + 1e-6).
HISTOGRAM_SCALE = 1e-3
HISTOGRAM_BINS = 8191  # odd: d = 0 is the centre of the middle bin
_HALF = HISTOGRAM_BINS // 2
_BIN_WIDTH = math.asinh(20.0 / HISTOGRAM_SCALE) / _HALF

# what the token pass sums, then what the loss knows beside it; the advantages are summed over response tokens
SUMS = (*TOKEN_SUMS, "normalizer", "loss", "reference_kl", "advantage", "weighted_advantage")
_SIGNS = ("negative", "positive")

QUANTILES = {
    "neg_is_p75": ("negative", 0.75),
    "neg_is_p995": ("negative", 0.995),
    "neg_is_p999": ("negative", 0.999),
    "pos_is_p25": ("positive", 0.25),
    "pos_is_median": ("positive", 0.5),
    "pos_is_p75": ("positive", 0.75),
    "pos_is_p995": ("positive", 0.995),
    "pos_is_p999": ("positive", 0.999),
}


@dataclass(frozen=True)
class RatioTerms:
    """What the quantiles of r are made from, computed when somebody logs them; no gradient.

    logp_T, old_logp_T, response_mask_T: [T] as given. advantage: [S] or [T] ([S] if both fit).
    """

    logp_T: Tensor
    old_logp_T: Tensor
    advantage: Tensor
    response_mask_T: Tensor
    cu_seqlens_S1: Tensor

    @cached_property
    def mask_T(self) -> Tensor:
        """Response tokens of a sequence: what lies past cu_seqlens[-1] is none."""
        tokens_T = torch.arange(self.logp_T.shape[0], device=self.logp_T.device)
        return self.response_mask_T & (tokens_T < self.cu_seqlens_S1[-1])

    @cached_property
    def log_ratio_T(self) -> Tensor:
        """d, 0 outside the response: selected, never multiplied by the mask, as padding may hold NaN."""
        ratio_T = torch.where(self.mask_T, self.logp_T - self.old_logp_T, 0.0)
        return ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    @cached_property
    def advantage_T(self) -> Tensor:
        """A, 0 outside the response."""
        advantage = self.advantage
        if advantage.shape[0] == self.cu_seqlens_S1.shape[0] - 1:
            advantage = expand_to_tokens(advantage, self.cu_seqlens_S1, self.logp_T.shape[0])
        return torch.where(self.mask_T, advantage, 0.0)


@dataclass(frozen=True)
class LossStatistics:
    """Sums fp64 [len(SUMS)], minima, maxima fp64 [len(EXTREMA)], histograms int64 [2, HISTOGRAM_BINS] (A < 0, A > 0).

    To reduce over ranks: all-reduce `sums` and `histograms` with SUM, `minima` with MIN, `maxima` with MAX, in place.
    """

    sums: Tensor
    minima: Tensor
    maxima: Tensor
    histograms: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "LossStatistics":
        """Of no tokens: what a rank without micro-batches brings to the reduction."""
        return cls(
            sums=torch.zeros(len(SUMS), dtype=torch.float64, device=device),
            minima=torch.full((len(EXTREMA),), torch.inf, dtype=torch.float64, device=device),
            maxima=torch.full((len(EXTREMA),), -torch.inf, dtype=torch.float64, device=device),
            histograms=torch.zeros(2, HISTOGRAM_BINS, dtype=torch.int64, device=device),
        )

    @classmethod
    def of(
        cls,
        token_statistics_K: Tensor,
        ratios: RatioTerms,
        weight_T: Tensor | None,
        *,
        loss_sum: Tensor,
        normalizer: Tensor,
        reference_kl: Tensor | None = None,
    ) -> "LossStatistics":
        """From the statistics of a token pass and its f [T] (None: 1); loss_sum / normalizer is the loss, both add up.

        reference_kl: the sum over response tokens of the KL estimates, if there are any.
        """
        sums, minima, maxima = token_statistics_K.split([len(TOKEN_SUMS), len(EXTREMA), len(EXTREMA)])
        reference_kl = torch.zeros_like(normalizer) if reference_kl is None else reference_kl
        weighted_T = ratios.advantage_T if weight_T is None else ratios.advantage_T * weight_T
        advantage, weighted = (values_T.sum(dtype=torch.float64) for values_T in (ratios.advantage_T, weighted_T))
        beside = (normalizer, loss_sum, reference_kl, advantage, weighted)
        return cls(
            sums=torch.cat([sums, torch.stack([value.double() for value in beside])]),
            minima=minima.clone(),
            maxima=maxima.clone(),
            histograms=_histograms(
                ratios.log_ratio_T, ratios.mask_T & (ratios.advantage_T < 0), ratios.mask_T & (ratios.advantage_T > 0)
            ),
        )

    @staticmethod
    def merge(a: "LossStatistics", b: "LossStatistics") -> "LossStatistics":
        return LossStatistics(
            sums=a.sums + b.sums,
            minima=torch.minimum(a.minima, b.minima),
            maxima=torch.maximum(a.maxima, b.maxima),
            histograms=a.histograms + b.histograms,
        )

    def metrics(self, quantiles: Mapping[str, float] | None = None) -> dict[str, float]:
        """{"actor/NAME": value} with the released code's names, and "fipo/active_fraction".

        Quantiles come from the histograms unless given. What no token contributes to is 0.
        """
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        low = dict(zip(EXTREMA, self.minima.tolist(), strict=True))
        high = dict(zip(EXTREMA, self.maxima.tolist(), strict=True))
        tokens, normalizer = max(sums["tokens"], 1.0), sums["normalizer"]
        values = {
            "influence_weights_mean": sums["weight"] / tokens,
            "influence_weights_min": _or_zero(low["weight"]),
            "influence_weights_max": _or_zero(high["weight"]),
            "influence_weights_mean_raw": sums["raw_weight"] / tokens,
            "raw_influence_weights_min": _or_zero(low["raw_weight"]),
            "raw_influence_weights_max": _or_zero(high["raw_weight"]),
            "IW_overall_clip_ratio": (sums["weight_at_high"] + sums["weight_at_low"]) / tokens,
            "IW_upper_clip_ratio": sums["weight_at_high"] / tokens,
            "IW_lower_clip_ratio": sums["weight_at_low"] / tokens,
            "neg_ratio_2_3": sums["negative_2_3"] / tokens,
            "neg_ratio_3_4": sums["negative_3_4"] / tokens,
            "neg_ratio_4_10": sums["negative_4_c"] / tokens,
            "neg_is_max": math.exp(high["negative_log_ratio"]),  # exp(-inf) = 0: no such token
            "pos_is_max": math.exp(high["positive_log_ratio"]),
            "pos_is_min": _or_zero(math.exp(low["positive_log_ratio"])),
            "pos_mini_frac": sums["positive_small"] / tokens,
            "pg_clipfrac": sums["clipped"] / tokens,
            "pg_clipfrac_lower": sums["dual_clipped"] / tokens,
            "ppo_kl": -sums["log_ratio"] / tokens,
            "pg_loss": sums["loss"] / normalizer if normalizer > 0 else 0.0,
            **(self._histogram_quantiles() if quantiles is None else quantiles),
        }
        return {f"actor/{name}": value for name, value in values.items()} | {
            "fipo/active_fraction": sums["active"] / tokens
        }

    def metrics_of(self, config: LossConfig) -> dict[str, float]:
        """`metrics` without those that say nothing about this loss, and with the KL to the reference model."""
        values = self.metrics() | self.mean_advantage()
        if config.influence is None:
            values = {name: value for name, value in values.items() if not _is_about_influence(name)}
        if not config.clips_twice:
            del values["actor/pg_clipfrac_lower"]
        if config.kl_weight:
            sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
            values["actor/reference_kl"] = sums["reference_kl"] / max(sums["tokens"], 1.0)
        return values

    def mean_advantage(self) -> dict[str, float]:
        """Of a response token, which weighs responses by their length; A alone, and A f."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        return {
            "advantage/length_weighted_mean": sums["advantage"] / tokens,
            "advantage/length_weighted_mean_with_f": sums["weighted_advantage"] / tokens,
        }

    def _histogram_quantiles(self) -> dict[str, float]:
        counts = self.histograms.cumsum(dim=1).cpu()
        minima, maxima = self.minima.tolist(), self.maxima.tolist()

        def ratio(sign: str, rank: int) -> float:
            row, extremum = _SIGNS.index(sign), EXTREMA.index(f"{sign}_log_ratio")
            d = log_ratio_of_bin(int(torch.searchsorted(counts[row], rank, right=True)))
            return math.exp(min(max(d, minima[extremum]), maxima[extremum]))

        return {
            name: _interpolate(lambda rank, sign=sign: ratio(sign, rank), int(counts[_SIGNS.index(sign), -1]), q)
            for name, (sign, q) in QUANTILES.items()
        }


def token_statistics(ratios: RatioTerms, future_kl_T: Tensor, weight_T: Tensor, config: FipoConfig) -> Tensor:
    """fp64 [K]: the operator's statistics_K, in plain torch."""
    mask_T, d_T, f_T = ratios.mask_T, ratios.log_ratio_T, weight_T
    r_T, raw_f_T = d_T.exp(), future_kl_T.clamp(-MAX_FUTURE_KL, MAX_FUTURE_KL).exp()
    negative_T, positive_T = mask_T & (ratios.advantage_T < 0), mask_T & (ratios.advantage_T > 0)
    c = config.dual_clip
    # with the range [0, 10] the released code takes the weight as unclipped
    ranged_T = mask_T if (config.weight_low, config.weight_high) != (0.0, 10.0) else torch.zeros_like(mask_T)

    def total(values_T: Tensor) -> Tensor:
        return torch.where(mask_T, values_T, 0.0).sum(dtype=torch.float64)

    sums = {
        "tokens": mask_T.sum(),
        "log_ratio": total(d_T),
        "clipped": ((negative_T & (r_T < 1 - config.clip_low)) | (positive_T & (r_T > 1 + config.clip_high))).sum(),
        "dual_clipped": (negative_T & (r_T > c)).sum(),
        "weight": total(f_T),
        "raw_weight": total(raw_f_T),
        "weight_at_high": (ranged_T & (f_T >= config.weight_high)).sum(),
        "weight_at_low": (ranged_T & (f_T <= config.weight_low)).sum(),
        "active": (mask_T & (f_T != 1)).sum(),
        "negative_2_3": (negative_T & (r_T >= 2) & (r_T < 3)).sum(),
        "negative_3_4": (negative_T & (r_T >= 3) & (r_T < 4)).sum(),
        "negative_4_c": (negative_T & (r_T >= 4) & (r_T < c)).sum(),
        "positive_small": (positive_T & (r_T < 1e-3)).sum(),
    }
    ranges = {
        "weight": (f_T, mask_T),
        "raw_weight": (raw_f_T, mask_T),
        "negative_log_ratio": (d_T, negative_T),
        "positive_log_ratio": (d_T, positive_T),
    }
    # one element more, so that there is a minimum without tokens
    lowest = [torch.where(m_T, v_T, torch.inf) for v_T, m_T in (ranges[name] for name in EXTREMA)]
    highest = [torch.where(m_T, v_T, -torch.inf) for v_T, m_T in (ranges[name] for name in EXTREMA)]
    return torch.stack(
        [sums[name].double() for name in TOKEN_SUMS]
        + [torch.nn.functional.pad(v_T, (0, 1), value=torch.inf).amin().double() for v_T in lowest]
        + [torch.nn.functional.pad(v_T, (0, 1), value=-torch.inf).amax().double() for v_T in highest]
    )


def exact_ratio_quantiles(ratios: RatioTerms) -> dict[str, float]:
    """The quantiles of r where A < 0 and where A > 0, interpolated linearly like torch.quantile; costs two sorts."""
    ordered = {
        "negative": ratios.log_ratio_T[ratios.mask_T & (ratios.advantage_T < 0)].sort().values,
        "positive": ratios.log_ratio_T[ratios.mask_T & (ratios.advantage_T > 0)].sort().values,
    }
    return {
        name: _interpolate(lambda rank, d=ordered[sign]: math.exp(float(d[rank])), ordered[sign].shape[0], q)
        for name, (sign, q) in QUANTILES.items()
    }


def _interpolate(value_at_rank, count: int, q: float) -> float:
    """Between the two values of ranks next to q (count - 1); 0 without values."""
    if count == 0:
        return 0.0
    position = q * (count - 1)
    rank = math.floor(position)
    below, above = value_at_rank(rank), value_at_rank(min(rank + 1, count - 1))
    return below + (position - rank) * (above - below)


def log_ratio_bin(d_T: Tensor) -> Tensor:
    """int64 [T]: the histogram's bin of each log-ratio, in [0, HISTOGRAM_BINS)."""
    return (torch.asinh(d_T / HISTOGRAM_SCALE) / _BIN_WIDTH).round().long().clamp(-_HALF, _HALF) + _HALF


def log_ratio_of_bin(bin_index: int) -> float:
    """The log-ratio at a bin's centre."""
    return HISTOGRAM_SCALE * math.sinh((bin_index - _HALF) * _BIN_WIDTH)


def _histograms(d_T: Tensor, negative_T: Tensor, positive_T: Tensor) -> Tensor:
    bin_T = log_ratio_bin(d_T)
    # tokens that belong to neither go to one slot behind the last bin
    slot_T = torch.where(negative_T, bin_T, torch.where(positive_T, bin_T + HISTOGRAM_BINS, 2 * HISTOGRAM_BINS))
    counts = torch.zeros(2 * HISTOGRAM_BINS + 1, dtype=torch.int64, device=d_T.device)
    return counts.scatter_add_(0, slot_T, torch.ones_like(slot_T))[:-1].view(2, HISTOGRAM_BINS)


def _is_about_influence(name: str) -> bool:
    return name.startswith("fipo/") or "influence_weights" in name or "IW_" in name or name.endswith("_with_f")


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0

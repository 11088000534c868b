"""Importance correction: the samples were drawn by the rollout engine, whose log-probs differ from the trainer's.

With rho[t] = exp(old_logp[t] - rollout_logp[t]), per response:

    token-tis:C               w[t] = min(rho[t], C)                          truncated importance sampling
    sequence-tis:C            w[t] = min(prod rho, C) for every token        the whole response's ratio
    token-band:LOW:HIGH       tokens with rho[t] outside the band are dropped
    sequence-mask:LOW:HIGH    responses whose geometric mean of rho is outside are dropped

A dropped token leaves numerator and denominator of the loss. Weights multiply the token loss and nothing else: the
ratio, the clip range and the future KL (that of dropped tokens included) stay those of the trainer's own log-probs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.ops.packed import expand_to_tokens, sum_per_sequence

MAX_LOG_WEIGHT = 20.0  # exp saturates there, so that one absurd log-prob gives no inf

_NUMBERS = {"token-tis": 1, "sequence-tis": 1, "token-band": 2, "sequence-mask": 2}

STATISTICS = ("tokens", "dropped", "truncated", "weight", "squared_weight")


@dataclass(frozen=True)
class CorrectionConfig:
    """Which corrections act; None leaves one out, and without any the weights are 1.

    At most one of token_tis and sequence_tis. Raises ValueError for values out of range.
    """

    token_tis: float | None = None
    sequence_tis: float | None = None
    token_band: tuple[float, float] | None = None
    sequence_mask: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.token_tis is not None and self.sequence_tis is not None:
            raise ValueError("token-tis and sequence-tis are two estimates of the same weight: give one of them")
        # comparisons are written so that NaN fails them
        for name, bound in (("token-tis", self.token_tis), ("sequence-tis", self.sequence_tis)):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} truncates at a positive weight, not at {bound:g}")
        for name, band in (("token-band", self.token_band), ("sequence-mask", self.sequence_mask)):
            if band is not None and not 0 <= band[0] <= 1 <= band[1]:
                raise ValueError(f"{name} keeps ratios from LOW <= 1 to HIGH >= 1, not from {band[0]:g} to {band[1]:g}")

    @classmethod
    def parse(cls, specs: Sequence[str]) -> "CorrectionConfig":
        """From ``token-tis:2``, ``sequence-mask:0.999:1.001`` and the like. Raises ValueError."""
        chosen: dict[str, Any] = {}
        for spec in specs:
            name, *numbers = spec.split(":")
            if len(numbers) != _NUMBERS.get(name) or not all(_is_number(number) for number in numbers):
                raise ValueError(
                    f"{spec!r} is none of token-tis:C, sequence-tis:C, token-band:LOW:HIGH, sequence-mask:LOW:HIGH"
                )
            values = tuple(float(number) for number in numbers)
            chosen[name.replace("-", "_")] = values if len(values) == 2 else values[0]
        return cls(**chosen)

    @property
    def acts(self) -> bool:
        return self != CorrectionConfig()

    @property
    def drops(self) -> bool:
        """Whether denominators depend on the log-probs."""
        return self.token_band is not None or self.sequence_mask is not None


@dataclass(frozen=True)
class Correction:
    """token_weight_T: fp32 [T], 0 where a token is dropped, 1 outside the response; for `fipo_loss`.

    statistics_K: fp64 [5], sums over response tokens in the order of STATISTICS; they add up over packs and ranks.
    """

    token_weight_T: Tensor
    statistics_K: Tensor


def importance_correction(
    old_logp_T: Tensor,
    rollout_logp_T: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: CorrectionConfig,
    *,
    log_ratio_2S: Tensor | None = None,
) -> Correction:
    """The weights of S packed sequences; no gradient.

    old_logp_T, rollout_logp_T: fp32 [T], the trainer's and the engine's log-probs before the first update.
    response_mask_T: bool [T]; what lies outside it, NaN included, has no influence. cu_seqlens_S1: [S + 1].
    log_ratio_2S: `sequence_log_ratio` of the whole sequences, for callers that pass a part of each.
    """
    inside_T = _inside(response_mask_T, cu_seqlens_S1)
    log_rho_T = _log_rho(old_logp_T, rollout_logp_T, inside_T)
    rho_T = log_rho_T.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    if log_ratio_2S is None:
        log_ratio_2S = sequence_log_ratio(old_logp_T, rollout_logp_T, response_mask_T, cu_seqlens_S1)
    sum_S, tokens_S = log_ratio_2S

    weight_T, bound = torch.ones_like(rho_T), torch.inf
    if config.token_tis is not None:
        weight_T, bound = rho_T, config.token_tis
    if config.sequence_tis is not None:
        product_S = sum_S.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
        weight_T, bound = expand_to_tokens(product_S, cu_seqlens_S1, rho_T.shape[0]).float(), config.sequence_tis
    truncated_T = inside_T & (weight_T > bound)
    weight_T = weight_T.clamp(max=bound)

    kept_T = torch.ones_like(inside_T)
    if config.token_band is not None:
        low, high = config.token_band
        kept_T = (rho_T >= low) & (rho_T <= high)
    if config.sequence_mask is not None:
        low, high = config.sequence_mask
        mean_S = (sum_S / tokens_S.clamp(min=1)).exp()
        kept_S = (mean_S >= low) & (mean_S <= high)
        kept_T = kept_T & expand_to_tokens(kept_S, cu_seqlens_S1, rho_T.shape[0])

    weight_T = torch.where(inside_T, torch.where(kept_T, weight_T, 0.0), 1.0)
    counted_T = torch.where(inside_T, weight_T, 0.0).double()
    counts = [tokens_T.sum().double() for tokens_T in (inside_T, inside_T & ~kept_T, truncated_T & kept_T)]
    return Correction(weight_T, torch.stack([*counts, counted_T.sum(), counted_T.square().sum()]))


def sequence_log_ratio(
    old_logp_T: Tensor, rollout_logp_T: Tensor, response_mask_T: Tensor, cu_seqlens_S1: Tensor
) -> Tensor:
    """fp64 [2, S]: of each sequence the sum of log rho over its response tokens, and how many there are."""
    inside_T = _inside(response_mask_T, cu_seqlens_S1)
    log_rho_T = _log_rho(old_logp_T, rollout_logp_T, inside_T)
    return torch.stack([sum_per_sequence(values_T, cu_seqlens_S1) for values_T in (log_rho_T, inside_T)])


def correction_metrics(statistics_K: Tensor) -> dict[str, float]:
    """{"correction/NAME": value}: shares of response tokens that were dropped and truncated, mean weight of the kept
    ones, and their effective sample size (sum w)^2 / sum w^2 as a share of all response tokens."""
    sums = dict(zip(STATISTICS, statistics_K.tolist(), strict=True))
    tokens, kept = max(sums["tokens"], 1.0), sums["tokens"] - sums["dropped"]
    return {
        "correction/dropped_fraction": sums["dropped"] / tokens,
        "correction/truncated_fraction": sums["truncated"] / tokens,
        "correction/weight_mean": sums["weight"] / max(kept, 1.0),
        "correction/effective_fraction": sums["weight"] ** 2 / max(sums["squared_weight"], 1e-30) / tokens,
    }


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+(e-?\d+)?|inf", text) is not None


def _inside(response_mask_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """Response tokens of a sequence: what lies past cu_seqlens[-1] is none."""
    return response_mask_T & (torch.arange(response_mask_T.shape[0], device=response_mask_T.device) < cu_seqlens_S1[-1])


def _log_rho(old_logp_T: Tensor, rollout_logp_T: Tensor, inside_T: Tensor) -> Tensor:
    return torch.where(inside_T, old_logp_T.detach() - rollout_logp_T, 0.0)

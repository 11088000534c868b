"""FIPO: DAPO's clipped policy-gradient loss with a weight per token from the future KL (arXiv 2603.19835, Eqs. 4-8).

Per response token t, with d = clamp(logp - old_logp, -20, 20), r = exp(d), advantage A:

    x[t] = d[t] if r[t] <= c else 0                         tokens beyond c do not enter the future KL
    F[t] = x[t] + gamma F[t+1],  gamma = 2^(-1/half_life)   future KL; tokens without response cost a step of decay too
    f[t] = clip(exp(F[t]), weight_low, weight_high)         influence weight, no gradient
    l[t] = max(-A f r, -A f clip(r, 1-clip_low, 1+clip_high))

`official` is the released code: where A < 0, f is clamped to [0.8, 1] if r > safety_threshold, and l is at most -A f c
(dual clip). `paper`: f = 1 if r > safety_threshold, no dual clip. With f = 1 everywhere this is DAPO.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fipo.loss.config import FipoConfig
from megatron_fipo.loss.inputs import check_sequence_values, check_token_tensors
from megatron_fipo.loss.metrics import (
    MAX_FUTURE_KL,
    MAX_LOG_RATIO,
    RatioTerms,
    exact_ratio_quantiles,
    token_statistics,
)
from megatron_fipo.loss.output import LossOutput, sum_of_losses
from megatron_fipo.ops.fused_loss import fused_fipo_loss
from megatron_fipo.ops.packed import check_cu_seqlens, check_offsets, sum_per_sequence
from megatron_fipo.ops.reference import reference_discounted_scan


@dataclass(frozen=True, kw_only=True)
class FipoOutput(LossOutput):
    """weights_T: f, [T], no gradient; outside the response that of F = 0."""

    weights_T: Tensor

    @cached_property
    def metrics(self) -> dict[str, float]:
        """{"actor/NAME": value} of this call alone, with exact quantiles."""
        return self.statistics.metrics(exact_ratio_quantiles(self.ratios))


def fipo_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: FipoConfig,
    *,
    group_ids_S: Tensor | None = None,
    token_weight_T: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
    carry_S: Tensor | None = None,
    beyond_c_S: Tensor | None = None,
    backend: str = "compiled",
) -> FipoOutput:
    """The FIPO loss of S packed sequences; the only gradient is that of logp_T.

    logp_T, old_logp_T: [T] fp32 or bf16 (backend "torch": fp32 or fp64), log-prob of each token under the trained
    policy and under the one before this rollout's first update. advantage: [S] or [T] ([S] if both fit).
    response_mask_T: [T] bool; what lies outside it, NaN included, has no influence.
    cu_seqlens_S1: [S + 1] int32 or int64.
    group_ids_S: [S], for normalization "group". token_weight_T: [T], factor of the token loss (importance correction);
    a token of weight 0 is dropped from the denominator too.
    loss_scale_S: [S], `loss_scale` of the whole mini-batch, for callers that pass only a part of it.
    carry_S, beyond_c_S: for callers that pass a part of each sequence (context parallelism): float [S], F just past the
    part's end, and int [S], the tokens with A < 0 and r > c of the whole sequence, by which the filter decides.
    backend: "compiled", or "torch" for the same in plain torch on any device.
    Raises ValueError, naming the argument, for wrong shapes, dtypes or missing group_ids_S.
    """
    num_tokens, num_sequences = logp_T.shape[0], cu_seqlens_S1.shape[0] - 1
    check_token_tensors(logp_T, old_logp_T, response_mask_T, token_weight_T, backend)
    check_cu_seqlens(cu_seqlens_S1)
    if backend == "torch":
        check_offsets(cu_seqlens_S1, num_tokens)
    check_sequence_values(
        num_sequences, num_tokens, advantage, carry_S=carry_S, beyond_c_S=beyond_c_S, loss_scale_S=loss_scale_S
    )

    if logp_T.device.type == "cpu" and logp_T.dtype == torch.bfloat16:  # only the CUDA kernels read it as it is
        logp_T, old_logp_T = logp_T.float(), old_logp_T.float()
    dtype = torch.float64 if logp_T.dtype == torch.float64 else torch.float32
    cu_seqlens_S1 = cu_seqlens_S1.contiguous()
    ratios = RatioTerms(
        logp_T.detach(), old_logp_T.detach(), advantage.detach().to(dtype), response_mask_T, cu_seqlens_S1
    )
    token_weight_T = None if token_weight_T is None else token_weight_T.detach().to(dtype)
    carry_S = None if carry_S is None else carry_S.detach().double()
    token_losses = compiled_token_losses if backend == "compiled" else torch_token_losses
    losses = token_losses(logp_T, ratios, token_weight_T, carry_S, config)
    tokens_S = losses.tokens_S
    if token_weight_T is not None:  # what the correction drops counts nowhere; in the future KL it stays
        tokens_S = sum_per_sequence(ratios.mask_T & (token_weight_T != 0), cu_seqlens_S1).long()
    beyond_c_S = losses.beyond_c_S if beyond_c_S is None else beyond_c_S

    # sequence filter: a response with several tokens beyond c has drifted away as a whole
    kept_S = beyond_c_S <= 1 if config.filters_sequences else torch.ones_like(beyond_c_S, dtype=torch.bool)
    total = sum_of_losses(
        losses.loss_S, tokens_S, kept_S, config.resolved_normalization, loss_scale_S, group_ids_S, dtype
    )
    return FipoOutput(**vars(total), token_statistics_K=losses.statistics_K, ratios=ratios, weights_T=losses.weight_T)


def influence_weight(future_kl_T: Tensor, ratio_T: Tensor, advantage_T: Tensor, config: FipoConfig) -> Tensor:
    """f [T]: exp(F) clipped to its range, reset by the safety rule."""
    weight_T = future_kl_T.clamp(-MAX_FUTURE_KL, MAX_FUTURE_KL).exp().clamp(config.weight_low, config.weight_high)
    safe_T = torch.ones_like(weight_T) if config.is_paper else weight_T.clamp(0.8, 1.0)
    return torch.where((advantage_T < 0) & (ratio_T > config.safety_threshold), safe_T, weight_T)


class TokenLosses(NamedTuple):
    """Per sequence the fp64 sum of token losses (differentiable in logp), response tokens and tokens beyond c; f [T];
    the statistics of the tokens, fp64 [K] in the operator's order."""

    loss_S: Tensor
    tokens_S: Tensor
    beyond_c_S: Tensor
    weight_T: Tensor
    statistics_K: Tensor


def torch_token_losses(
    logp_T: Tensor, ratios: RatioTerms, token_weight_T: Tensor | None, carry_S: Tensor | None, config: FipoConfig
) -> TokenLosses:
    """In plain torch: what the fused operator is measured by."""
    c, mask_T, A_T, cu_seqlens_S1 = config.dual_clip, ratios.mask_T, ratios.advantage_T, ratios.cu_seqlens_S1
    d_T = torch.where(mask_T, logp_T - ratios.old_logp_T, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    r_T = d_T.exp()

    with torch.no_grad():
        x_T = torch.where(d_T <= math.log(c), d_T, 0.0)
        F_T = reference_discounted_scan(x_T.double(), cu_seqlens_S1, config.gamma, carry=carry_S).to(x_T.dtype)
        F_T = torch.where(mask_T, F_T, 0.0)
        f_T = influence_weight(F_T, r_T, A_T, config)

    clipped_r_T = r_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    w_T = A_T * f_T
    l1_T, l2_T = -w_T * r_T, -w_T * clipped_r_T
    loss_T = torch.where(l1_T >= l2_T, l1_T, l2_T)  # torch.maximum would halve the gradient where they are equal
    beyond_c_T = (A_T < 0) & (r_T > c)  # the same as max(r, clip(r)) > c, as c > 1
    if not config.is_paper:
        loss_T = torch.where(beyond_c_T, -w_T * c, loss_T)
    if token_weight_T is not None:
        loss_T = loss_T * torch.where(mask_T, token_weight_T, 0.0)

    loss_S, tokens_S, beyond_c_S = (sum_per_sequence(v_T, cu_seqlens_S1) for v_T in (loss_T, mask_T, beyond_c_T))
    return TokenLosses(loss_S, tokens_S.long(), beyond_c_S.long(), f_T, token_statistics(ratios, F_T, f_T, config))


def compiled_token_losses(
    logp_T: Tensor, ratios: RatioTerms, token_weight_T: Tensor | None, carry_S: Tensor | None, config: FipoConfig
) -> TokenLosses:
    """By the fused operator."""
    num_sequences = ratios.cu_seqlens_S1.shape[0] - 1
    fused = fused_fipo_loss(
        logp_T.contiguous(),
        ratios.old_logp_T.contiguous(),
        ratios.advantage.contiguous(),
        ratios.response_mask_T.contiguous(),
        ratios.cu_seqlens_S1,
        token_weight_T=None if token_weight_T is None else token_weight_T.contiguous(),
        carry=None if carry_S is None else carry_S.contiguous(),
        advantage_is_per_token=ratios.advantage.shape[0] != num_sequences,
        gamma=config.gamma,
        weight_low=config.weight_low,
        weight_high=config.weight_high,
        safety_threshold=config.safety_threshold,
        dual_clip=config.dual_clip,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        paper=config.is_paper,
    )
    return TokenLosses(fused.loss_S, fused.counts_S2[:, 0], fused.counts_S2[:, 1], fused.weight_T, fused.statistics_K)

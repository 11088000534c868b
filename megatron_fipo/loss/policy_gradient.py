"""Policy-gradient losses with another ratio than `fipo_loss`, in plain torch.

Per response token t of a response with n response tokens, d = logp - old_logp, advantage A, sg = stop gradient,
clip to [1 - clip_low, 1 + clip_high]:

    gspo    s = exp(sum of d / n),  s[t] = sg(s) exp(logp[t]) / sg(exp(logp[t]))
            l[t] = max(-A s[t], -A clip(s[t]))                  arXiv 2507.18071, Eqs. 5, 7, 13, 14
    cispo   l[t] = -sg(clip(r[t])) A logp[t],  r[t] = exp(d[t])      arXiv 2506.13585, Eqs. 4, 5

GSPO clips whole responses: s[t] has the value of s at every token, and the gradient of logp[t]. CISPO clips the weight
of a token's gradient and never takes the gradient away.
"""

import torch
from torch import Tensor

from megatron_fipo.loss.config import FipoConfig, RatioConfig
from megatron_fipo.loss.correction import sequence_log_ratio
from megatron_fipo.loss.inputs import check_sequence_values, check_token_tensors
from megatron_fipo.loss.metrics import MAX_LOG_RATIO, TOKEN_SUMS, RatioTerms, token_statistics
from megatron_fipo.loss.output import LossOutput, sum_of_losses
from megatron_fipo.ops.packed import check_cu_seqlens, check_offsets, expand_to_tokens, sum_per_sequence


def ratio_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    config: RatioConfig,
    *,
    group_ids_S: Tensor | None = None,
    token_weight_T: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
    log_ratio_2S: Tensor | None = None,
) -> LossOutput:
    """GSPO or CISPO of S packed sequences; arguments and result as in `fipo_loss`, fp32 or fp64.

    log_ratio_2S: `sequence_log_ratio` of the whole sequences, for callers that pass a part of each.
    """
    num_tokens, num_sequences = logp_T.shape[0], cu_seqlens_S1.shape[0] - 1
    check_token_tensors(logp_T, old_logp_T, response_mask_T, token_weight_T, "torch")
    check_cu_seqlens(cu_seqlens_S1)
    check_offsets(cu_seqlens_S1, num_tokens)
    check_sequence_values(num_sequences, num_tokens, advantage, loss_scale_S=loss_scale_S)
    dtype = logp_T.dtype
    ratios = RatioTerms(
        logp_T.detach(), old_logp_T.detach(), advantage.detach().to(dtype), response_mask_T, cu_seqlens_S1
    )
    mask_T, A_T = ratios.mask_T, ratios.advantage_T
    logp_T = torch.where(mask_T, logp_T, 0.0)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.kind == "gspo":
        if log_ratio_2S is None:
            log_ratio_2S = sequence_log_ratio(logp_T, old_logp_T, response_mask_T, cu_seqlens_S1)
        s_T = expand_to_tokens(sequence_ratio(log_ratio_2S), cu_seqlens_S1, num_tokens).to(dtype)
        ratio_T = s_T * (logp_T - logp_T.detach()).exp()
        l1_T, l2_T = -A_T * ratio_T, -A_T * ratio_T.clamp(low, high)
        loss_T = torch.where(l1_T >= l2_T, l1_T, l2_T)  # torch.maximum would halve the gradient where they are equal
        clipped_T = ((A_T < 0) & (s_T < low)) | ((A_T > 0) & (s_T > high))
    else:
        r_T = ratios.log_ratio_T.exp()
        loss_T = -r_T.clamp(low, high) * A_T * logp_T
        clipped_T = mask_T & ((r_T < low) | (r_T > high))

    counted_T = mask_T
    if token_weight_T is not None:
        weight_T = torch.where(mask_T, token_weight_T.detach().to(dtype), 0.0)
        loss_T, counted_T = loss_T * weight_T, mask_T & (weight_T != 0)
    loss_S, tokens_S = (sum_per_sequence(values_T, cu_seqlens_S1) for values_T in (loss_T, counted_T))
    total = sum_of_losses(
        loss_S,
        tokens_S.long(),
        torch.ones_like(tokens_S, dtype=torch.bool),
        config.normalization,
        loss_scale_S,
        group_ids_S,
        dtype,
    )
    return LossOutput(**vars(total), token_statistics_K=_statistics(ratios, clipped_T), ratios=ratios)


def sequence_ratio(log_ratio_2S: Tensor) -> Tensor:
    """fp64 [S]: the geometric mean of a response's ratios, from their sum of logarithms and their number."""
    sum_S, tokens_S = log_ratio_2S
    return (sum_S / tokens_S.clamp(min=1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _statistics(ratios: RatioTerms, clipped_T: Tensor) -> Tensor:
    """The statistics of the token ratios, f being 1; the share of clipped tokens is this loss's own."""
    nothing_T = torch.zeros_like(ratios.log_ratio_T)
    statistics_K = token_statistics(ratios, nothing_T, nothing_T + 1, FipoConfig())
    statistics_K[TOKEN_SUMS.index("clipped")] = clipped_T.sum()
    return statistics_K

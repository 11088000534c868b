"""What every loss returns, and how the sums of its sequences become one number."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_fipo.loss.metrics import LossStatistics, RatioTerms
from megatron_fipo.loss.normalization import loss_scale


@dataclass(frozen=True)
class LossSum:
    """loss = loss_sum / denominator, differentiable in logp like loss_sum; scalars fp32 (fp64 for an fp64 logp).

    With normalization "token" the denominator is the number of kept response tokens: over micro-batches and ranks, add
    up both and divide once. With "group" and "sequence" the sum is already scaled and the denominator is 1.
    denominator, normalizer: fp64; the normalizer is this call's additive share of the whole mini-batch's denominator.
    kept_S, loss_scale_S: bool and fp64 [S], which sequences count and what their sums were multiplied by.
    """

    loss: Tensor
    loss_sum: Tensor
    denominator: Tensor
    normalizer: Tensor
    kept_S: Tensor
    loss_scale_S: Tensor


@dataclass(frozen=True, kw_only=True)
class LossOutput(LossSum):
    """The sum, and what the statistics are made from.

    weights_T: f [T], no gradient; None: the loss has no influence weights.
    policy_loss_sum, reference_kl_sum: where penalties were added, fp32 scalar, the part of loss_sum that is the policy
    gradient's, and fp64 scalar, the sum of the KL estimates over response tokens.
    """

    token_statistics_K: Tensor
    ratios: RatioTerms
    weights_T: Tensor | None = None
    policy_loss_sum: Tensor | None = None
    reference_kl_sum: Tensor | None = None

    @cached_property
    def statistics(self) -> LossStatistics:
        """Mergeable over micro-batches and ranks."""
        loss_sum = self.loss_sum if self.policy_loss_sum is None else self.policy_loss_sum
        return LossStatistics.of(
            self.token_statistics_K,
            self.ratios,
            self.weights_T,
            loss_sum=loss_sum.detach(),
            normalizer=self.normalizer,
            reference_kl=self.reference_kl_sum,
        )


def sum_of_losses(
    loss_S: Tensor,
    tokens_S: Tensor,
    kept_S: Tensor,
    normalization: str,
    loss_scale_S: Tensor | None,
    group_ids_S: Tensor | None,
    dtype: torch.dtype,
) -> LossSum:
    """From each sequence's sum of token losses, fp64 [S].

    tokens_S: int64, its response tokens that count. kept_S: bool. loss_scale_S: that of the whole mini-batch; None if
    these are all of its sequences, and then "group" needs group_ids_S. dtype: of the loss.
    """
    per_token = normalization == "token"
    if loss_scale_S is None:
        loss_scale_S = loss_scale(normalization, tokens_S, group_ids_S)
    loss_scale_S = loss_scale_S.double()
    loss_sum = torch.where(kept_S, loss_S * loss_scale_S, 0.0).sum().to(dtype)
    # the share of the mini-batch in this call: kept tokens, or the part of 1 that its tokens hold
    counted_S = torch.where(kept_S, tokens_S, 0) if per_token else tokens_S
    normalizer = (counted_S * loss_scale_S).sum()
    denominator = normalizer if per_token else torch.ones_like(normalizer)
    loss = loss_sum / torch.where(denominator > 0, denominator, 1.0).to(dtype)
    return LossSum(loss, loss_sum, denominator, normalizer, kept_S, loss_scale_S)

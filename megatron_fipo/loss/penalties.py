"""What is added to a policy-gradient loss: the KL to a reference model, and an entropy bonus."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_fipo.loss.config import LossConfig
from megatron_fipo.loss.kl import kl_estimate
from megatron_fipo.loss.output import LossOutput
from megatron_fipo.ops.packed import sum_per_sequence


def with_penalties[Output: LossOutput](
    out: Output,
    logp_T: Tensor,
    config: LossConfig,
    *,
    ref_logp_T: Tensor | None,
    entropy_T: Tensor | None,
    token_weight_T: Tensor | None,
) -> Output:
    """``out`` plus kl_weight KL - entropy_weight H of each response token, normalised like the policy-gradient loss.

    An importance correction weighs these terms too: they are expectations over the same samples. What the sequence
    filter drops, it drops from them as well.

    out: the loss of the same tokens. logp_T: [T], as it was given to that loss. ref_logp_T: [T], needed with a KL;
    entropy_T: [T], differentiable, needed with an entropy bonus. token_weight_T: [T], the importance correction.
    Raises ValueError, naming the argument, for what is missing.
    """
    if not (config.kl_weight or config.entropy_weight):
        return out
    mask_T, cu_seqlens_S1 = out.ratios.mask_T, out.ratios.cu_seqlens_S1
    penalty_T, reference_kl_sum = torch.zeros_like(logp_T), None
    if config.kl_weight:
        if ref_logp_T is None:
            raise ValueError(f"kl_weight {config.kl_weight:g} needs ref_logp_T, the reference model's log-probs")
        kl_T = kl_estimate(logp_T, ref_logp_T, mask_T, config.kl_estimator)
        reference_kl_sum = kl_T.detach().sum(dtype=torch.float64)
        penalty_T = penalty_T + config.kl_weight * kl_T
    if config.entropy_weight:
        if entropy_T is None:
            raise ValueError(f"entropy_weight {config.entropy_weight:g} needs entropy_T")
        penalty_T = penalty_T - config.entropy_weight * torch.where(mask_T, entropy_T, 0.0)
    if token_weight_T is not None:
        penalty_T = penalty_T * torch.where(mask_T, token_weight_T, 0.0)
    penalty_S = sum_per_sequence(penalty_T, cu_seqlens_S1) * out.loss_scale_S
    loss_sum = out.loss_sum + torch.where(out.kept_S, penalty_S, 0.0).sum().to(out.loss_sum.dtype)
    return replace(
        out,
        loss=loss_sum / torch.where(out.denominator > 0, out.denominator, 1.0).to(loss_sum.dtype),
        loss_sum=loss_sum,
        policy_loss_sum=out.loss_sum.detach(),
        reference_kl_sum=reference_kl_sum,
    )

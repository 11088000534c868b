"""The FIPO loss of packed sequences with its gradient, in one pass over the tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fipo.ops.library import operators
from megatron_fipo.ops.packed import expand_to_tokens


class FusedLoss(NamedTuple):
    """loss_S fp64 [S]: sum of each sequence's token losses, differentiable in logp (once).

    counts_S2 int64 [S, 2]: response tokens, and those with A < 0 and max(r, clip(r)) > c.
    grad_T, weight_T, future_kl_T fp32 [T]: d(token loss)/d(logp), f and F.
    """

    loss_S: Tensor
    counts_S2: Tensor
    grad_T: Tensor
    weight_T: Tensor
    future_kl_T: Tensor


@torch.library.register_fake("megatron_fipo::fipo_loss")
def _(logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, token_weight_T, carry, *settings):
    num_sequences = cu_seqlens_S1.shape[0] - 1
    return (
        logp_T.new_empty(num_sequences, dtype=torch.float64),
        logp_T.new_empty(num_sequences, 2, dtype=torch.int64),
        torch.empty_like(logp_T),
        torch.empty_like(logp_T),
        torch.empty_like(logp_T),
    )


def _save(ctx, inputs, output):
    _, _, grad_T, _, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(grad_T, inputs[4])


def _backward(ctx, grad_loss_S, *_):
    grad_T, cu_seqlens_S1 = ctx.saved_tensors
    scale_T = expand_to_tokens(grad_loss_S.to(grad_T.dtype), cu_seqlens_S1, grad_T.shape[0])
    return scale_T * grad_T, *(None,) * 15


torch.library.register_autograd("megatron_fipo::fipo_loss", _backward, setup_context=_save)


def fused_fipo_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    token_weight_T: Tensor | None = None,
    carry: Tensor | None = None,
    advantage_is_per_token: bool,
    gamma: float,
    weight_low: float,
    weight_high: float,
    safety_threshold: float,
    dual_clip: float,
    clip_low: float,
    clip_high: float,
    paper: bool,
) -> FusedLoss:
    """The formulas of `megatron_fipo.loss.fipo` before filter and normalisation, contiguous fp32 tensors in.

    carry: fp64 [S], the future KL just past each sequence's end (the next shard's, under context parallelism).
    """
    return FusedLoss(
        *operators.fipo_loss(
            logp_T,
            old_logp_T,
            advantage,
            response_mask_T,
            cu_seqlens_S1,
            token_weight_T,
            carry,
            advantage_is_per_token,
            gamma,
            weight_low,
            weight_high,
            safety_threshold,
            dual_clip,
            clip_low,
            clip_high,
            paper,
        )
    )

"""The FIPO loss of packed sequences with its gradient and its statistics, in one pass over the tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fipo._host import loss_statistics
from megatron_fipo.ops.library import operators
from megatron_fipo.ops.packed import check_offsets

# Names of statistics_K: the sums, then a minimum for each of EXTREMA, then a maximum for each.
SUMS: tuple[str, ...] = loss_statistics()["sums"]
EXTREMA: tuple[str, ...] = loss_statistics()["extrema"]
NUM_STATISTICS = len(SUMS) + 2 * len(EXTREMA)


class FusedLoss(NamedTuple):
    """loss_S fp64 [S]: sum of each sequence's token losses, differentiable in logp (once).

    counts_S2 int64 [S, 2]: response tokens, and those with A < 0 and r > c.
    grad_T, weight_T fp32 [T]: d(token loss)/d(logp), 0 outside the response, and f, there that of F = 0.
    statistics_K fp64 [K]: SUMS, minima and maxima of EXTREMA over all response tokens.
    """

    loss_S: Tensor
    counts_S2: Tensor
    grad_T: Tensor
    weight_T: Tensor
    statistics_K: Tensor


def _per_sequence(logp_T: Tensor, cu_seqlens_S1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_sequences = cu_seqlens_S1.shape[0] - 1
    return (
        logp_T.new_empty(num_sequences, dtype=torch.float64),
        logp_T.new_empty(num_sequences, 2, dtype=torch.int64),
        logp_T.new_empty(NUM_STATISTICS, dtype=torch.float64),
    )


@torch.library.register_fake("megatron_fipo::fipo_loss")
def _(logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, token_weight_T, carry, *settings):
    loss_S, counts_S2, statistics_K = _per_sequence(logp_T, cu_seqlens_S1)
    grad_T, weight_T = (torch.empty_like(logp_T, dtype=torch.float32) for _ in range(2))
    return loss_S, counts_S2, grad_T, weight_T, statistics_K


@torch.library.register_fake("megatron_fipo::fipo_loss_out")
def _(logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, *rest):
    return _per_sequence(logp_T, cu_seqlens_S1)


@torch.library.register_fake("megatron_fipo::future_kl_aggregate")
def _(logp_T, old_logp_T, advantage, response_mask_T, cu_seqlens_S1, *settings):
    num_sequences = cu_seqlens_S1.shape[0] - 1
    return (
        logp_T.new_empty(num_sequences, dtype=torch.float32),
        logp_T.new_empty(num_sequences, dtype=torch.int32),
    )


@torch.library.register_fake("megatron_fipo::scale_per_sequence")
def _(values_T, scale_S, cu_seqlens_S1):
    return torch.empty_like(values_T)


def _save(ctx, inputs, output):
    logp_T, cu_seqlens_S1, grad_T = inputs[0], inputs[4], output[2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(grad_T, cu_seqlens_S1)
    ctx.dtype = logp_T.dtype


def _backward(ctx, grad_loss_S, *_):
    grad_T, cu_seqlens_S1 = ctx.saved_tensors
    scaled_T = operators.scale_per_sequence(grad_T, grad_loss_S.contiguous(), cu_seqlens_S1)
    return scaled_T.to(ctx.dtype), *(None,) * 15


torch.library.register_autograd("megatron_fipo::fipo_loss", _backward, setup_context=_save)


class _EagerLoss(torch.autograd.Function):
    """The same gradient for eager calls: what torch makes of the registration costs 100 us a call in Python."""

    @staticmethod
    def forward(ctx, *inputs):
        grad_T, weight_T = (torch.empty_like(inputs[0], dtype=torch.float32) for _ in range(2))
        loss_S, counts_S2, statistics_K = operators.fipo_loss_out(*inputs, grad_T, weight_T)
        output = loss_S, counts_S2, grad_T, weight_T, statistics_K
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


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
    out: tuple[Tensor, Tensor] | None = None,
) -> FusedLoss:
    """The formulas of `megatron_fipo.loss.fipo` before filter and normalisation, contiguous fp32 tensors in.

    carry: fp64 [S], the future KL just past each sequence's end (the next shard's, under context parallelism).
    out: fp32 [T] buffers that receive grad_T and weight_T; then the result carries no gradient of its own. At millions
    of tokens the first touch of fresh memory costs more than the pass.
    """
    arguments = (
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
    needs_gradient = torch.is_grad_enabled() and logp_T.requires_grad
    if out is not None and needs_gradient:
        raise ValueError("out cannot be combined with a gradient: detach logp_T, or leave out away")
    try:
        if out is not None:
            loss_S, counts_S2, statistics_K = operators.fipo_loss_out(*arguments, *out)
            return FusedLoss(loss_S, counts_S2, *out, statistics_K)
        eager = needs_gradient and not torch.compiler.is_compiling()
        return FusedLoss(*(_EagerLoss.apply if eager else operators.fipo_loss)(*arguments))
    except RuntimeError:
        check_offsets(cu_seqlens_S1, logp_T.shape[0])  # says it as ValueError if that is what the operator refused
        raise


def future_kl_aggregate(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage: Tensor,
    response_mask_T: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    advantage_is_per_token: bool,
    gamma: float,
    dual_clip: float,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """What a shard tells the others: F at each sequence's first token with nothing behind its last (fp32 [S]; with
    n tokens and a carry C it would be F + gamma^n C), and its tokens with A < 0 and r > c (int32 [S])."""
    return operators.future_kl_aggregate(
        logp_T,
        old_logp_T,
        advantage,
        response_mask_T,
        cu_seqlens_S1,
        advantage_is_per_token,
        gamma,
        dual_clip,
        clip_low,
        clip_high,
    )

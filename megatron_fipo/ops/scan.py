"""Discounted scan of packed sequences: y[t] = x[t] + gamma * y[t + 1] (reverse) or + gamma * y[t - 1]."""

import torch
from torch import Tensor

from megatron_fipo.ops.library import operators
from megatron_fipo.ops.packed import check_cu_seqlens, check_offsets


@torch.library.register_fake("megatron_fipo::discounted_scan")
def _(x_T, cu_seqlens_S1, gamma, reverse, carry):
    return torch.empty_like(x_T)


@torch.library.register_fake("megatron_fipo::discounted_scan_out")
def _(x_T, cu_seqlens_S1, gamma, reverse, carry, out):
    return None


def _save(ctx, inputs, output):
    _, cu_seqlens_S1, ctx.gamma, ctx.reverse, _ = inputs
    ctx.save_for_backward(cu_seqlens_S1)


def _backward(ctx, grad_T):
    """The scan is linear: its transpose is the scan in the other direction, and the carry stands one step outside."""
    (cu_seqlens_S1,) = ctx.saved_tensors
    grad_x_T = operators.discounted_scan(grad_T.contiguous(), cu_seqlens_S1, ctx.gamma, not ctx.reverse, None)
    if not ctx.needs_input_grad[4]:
        return grad_x_T, None, None, None, None
    starts, ends = cu_seqlens_S1[:-1], cu_seqlens_S1[1:]
    # one zero behind the tokens, so that an empty sequence has something to point at
    edge_S = torch.where(ends > starts, ends - 1 if ctx.reverse else starts, grad_x_T.shape[0])
    grad_carry_S = ctx.gamma * torch.cat([grad_x_T, grad_x_T.new_zeros(1)])[edge_S].double()
    return grad_x_T, None, None, None, grad_carry_S


torch.library.register_autograd("megatron_fipo::discounted_scan", _backward, setup_context=_save)


def discounted_scan(
    x_T: Tensor,
    cu_seqlens_S1: Tensor,
    gamma: float,
    *,
    reverse: bool = True,
    carry: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Discounted sum over the rest of each sequence (reverse) or over what came before it, itself included.

    x_T: [T] fp32 or fp64. cu_seqlens_S1: [S + 1] int32 or int64, from 0 up; tokens past its last entry give 0.
    gamma: discount per token, used in double. carry: [S] float, the value just past each sequence's end (reverse) or
    before its start; 0 by default. out: written and returned if given, like x_T (and may be x_T).
    Differentiable in x_T and carry; with `out` nothing may require a gradient.
    Raises ValueError, naming the argument, for wrong dtypes, shapes or a cu_seqlens that is not ascending from 0.
    """
    if carry is not None:
        check_cu_seqlens(cu_seqlens_S1)
        if carry.shape != (cu_seqlens_S1.shape[0] - 1,) or not carry.dtype.is_floating_point:
            raise ValueError(
                f"carry must be a float tensor of shape [{cu_seqlens_S1.shape[0] - 1}], "
                f"not {carry.dtype} {list(carry.shape)}"
            )
        carry = carry.double().contiguous()
    x_T, cu_seqlens_S1 = x_T.contiguous(), cu_seqlens_S1.contiguous()
    differentiable = x_T.requires_grad or (carry is not None and carry.requires_grad)
    if out is not None and differentiable and torch.is_grad_enabled():
        raise ValueError("out cannot be combined with a gradient: detach x and carry, or leave out away")
    try:
        if out is None:
            return operators.discounted_scan(x_T, cu_seqlens_S1, gamma, reverse, carry)
        operators.discounted_scan_out(x_T, cu_seqlens_S1, gamma, reverse, carry, out)
        return out
    except RuntimeError:
        # the operators refuse all of this on their own, so that a call in cache does not pay for the checks twice
        _check_arguments(x_T, cu_seqlens_S1, out)
        raise


def _check_arguments(x_T: Tensor, cu_seqlens_S1: Tensor, out: Tensor | None) -> None:
    """Raises the ValueError that names what an operator has refused."""
    if x_T.dtype not in (torch.float32, torch.float64) or x_T.dim() != 1:
        raise ValueError(f"x must be float32 or float64 of shape [T], not {x_T.dtype} {list(x_T.shape)}")
    check_cu_seqlens(cu_seqlens_S1)
    check_offsets(cu_seqlens_S1, x_T.shape[0])
    if out is not None and (out.dtype != x_T.dtype or out.shape != x_T.shape or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous, {x_T.dtype} {list(x_T.shape)}, not {out.dtype} {list(out.shape)}")

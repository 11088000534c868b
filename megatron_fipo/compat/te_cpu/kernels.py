"""TransformerEngine's norms, GEMM and transpose on a CPU.

Arguments are those of the functions of the same names in pytorch/csrc/extensions/pybind.cpp; the conditions under which
an FP8 GEMM is refused are those of common/gemm/cublaslt_gemm.cu.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_fipo.compat import te_cpu
from megatron_fipo.compat.te_cpu.quantization import TORCH_TYPE, as_matrix, matrix_of, quantize


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """Normalised and, with a quantizer, quantised values; the reciprocal deviations fp32 [M]."""
    x_MK = as_matrix(x)
    rsigma_M = torch.rsqrt(x_MK.square().mean(1) + eps)
    normal = (x_MK * rsigma_M[:, None] * _gain(weight, zero_centered)).to(TORCH_TYPE[int(otype)]).view(x.shape)
    return _finished(normal, out, quantizer), None, rsigma_M


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    x_MK, dz_MK, rsigma_M1 = as_matrix(x), as_matrix(dz), rsigma.reshape(-1, 1)
    normal_MK = x_MK * rsigma_M1
    scaled_MK = dz_MK * _gain(weight, zero_centered)
    dx_MK = (scaled_MK - normal_MK * (scaled_MK * normal_MK).mean(1, keepdim=True)) * rsigma_M1
    return dx_MK.view(x.shape).to(x.dtype), (dz_MK * normal_MK).sum(0).to(weight.dtype)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.detach().float() + (1 if zero_centered else 0)


def _finished(normal: Tensor, out: Tensor | None, quantizer: Any) -> Any:
    if out is not None and quantizer is None:
        return out.copy_(normal)
    return normal if quantizer is None else quantize(normal, quantizer, out)


def generic_gemm(
    A: Any, transa: bool, B: Any, transb: bool, D: Tensor | None, quantizer: Any, out_dtype: int | None,
    bias: Tensor | None, bias_type: int, gelu: bool, gelu_in: Tensor | None, grad: bool, workspace: Tensor,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, *, alpha: float = 1.0,
    beta: float | None = None, **overlap: Any,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """D = alpha op(B) op(A) + beta D, of row-major matrices; `transa` means A [n, k] and `transb` B [k, m].

    A transposed A and a plain B are read along their rows, so their rowwise copies enter, else the columnwise ones.

    Returns:
        D, the gradient of the bias (with `grad`), and nothing for GELU and overlapped communication.
    """
    assert not gelu and all(value in (None, False) for value in overlap.values()), "not emulated"
    left, right = matrix_of(B, columnwise=transb), matrix_of(A, columnwise=not transa)
    left, right = (left.T if transb else left), (right.T if transa else right)  # [m, k], [k, n]
    _check_shape(A, B, left.size(0), left.size(1), right.size(1))
    product = (alpha * (left.double() @ right.double())).float()  # the same for a row whatever other rows there are
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = matrix_of(B, columnwise=transb).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if not transb:
        product = product.view(*B.size()[:-1], product.size(1))
    if D is not None:
        before = (1.0 if beta is None else beta) * D.float() if accumulate else 0.0
        D.copy_((product.view(D.shape) + before).to(D.dtype))
    else:
        D = product.to(TORCH_TYPE[int(out_dtype)] if out_dtype is not None else torch.bfloat16)
    return (D if quantizer is None else quantize(D, quantizer)), bias_gradient, None, None


def _check_shape(A: Any, B: Any, m: int, k: int, n: int) -> None:
    """Refuse what cuBLAS refuses of FP8 operands; `m` and `n` are the outer sizes of B and A."""
    kinds = [type(x).__name__ for x in (A, B)]
    if any(kind.startswith("Float8") for kind in kinds) and k % 16:
        raise RuntimeError(f"an FP8 GEMM sums over {k} values, which is no multiple of 16. Caller must pad.")
    if not any(kind.startswith("Float8Block") for kind in kinds):
        return
    if n % 8 or (m % 8 and not B._is_2D_scaled):
        raise RuntimeError(f"a block-scaled GEMM [{m}, {k}] x [{k}, {n}] needs multiples of 8. Caller must pad.")
    if te_cpu.capability() >= (10, 0) and not all(x._quantizer.force_pow_2_scales for x in (A, B) if x._quantizer):
        raise RuntimeError("Blackwell computes block scaling as MXFP8, which needs scales that are powers of two")


def fp8_transpose(tensor: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """The transpose of raw FP8 data, [..., K] -> [K, M]."""
    transposed = tensor.reshape(-1, tensor.shape[-1]).T.contiguous()
    return transposed if out is None else out.copy_(transposed.view(out.shape))


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """[A, B, ...] -> [B, A, ...]."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the quantised gradient that it comes from."""
    return as_matrix(gradient).sum(0).to(gradient.dtype), quantize(gradient, quantizer)

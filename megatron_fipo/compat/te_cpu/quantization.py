"""What TransformerEngine's quantisation kernels compute, for per-tensor, block and MXFP8 scaling.

Formulas: TransformerEngine's common/recipe/recipe_common.cuh (scales of tensors and blocks), ptx_arch_spec.cuh (E8M0
exponents) and pytorch/csrc/quantizer.cpp (layouts). Bytes are those of the CUDA kernels as far as these can be read,
but for MXFP8's specialised Blackwell kernel, which multiplies the largest value with 1/448 rounded to bf16.

Suffixes: _MK a tensor as a matrix, its last dimension K; _RC its scales, one for each block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TORCH_TYPE = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}
"""By the value of transformer_engine_torch.DType."""

BLOCK = 128  # of block scaling
MX_BLOCK = 32


def scale_of(amax: Tensor, largest: float, *, power_of_two: bool, epsilon: float, infinite: float) -> Tensor:
    """What values are multiplied with before they are cast, fp32.

    Args:
        amax: fp32, the largest magnitudes.
        largest: of the FP8 type.
        infinite: replaces an infinite scale: the largest number of the input's type.
    """
    amax = amax.clamp_min(epsilon)
    scale = torch.full_like(amax, largest).div(amax).clamp_max(infinite)  # number / tensor would round twice
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)  # cut the mantissa
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def blocks_of(values_MK: Tensor, rows: int, columns: int) -> Tensor:
    """[M, K] -> [R, rows, C, columns], zeros where the matrix ends within a block."""
    height, width = values_MK.shape
    padded = F.pad(values_MK, (0, -width % columns, 0, -height % rows))
    return padded.view(padded.size(0) // rows, rows, padded.size(1) // columns, columns)


def cast_blocks(values_MK: Tensor, scale_RC: Tensor, rows: int, columns: int, fp8: torch.dtype) -> Tensor:
    """The matrix times its blocks' scales in FP8, as uint8 [M, K]."""
    height, width = values_MK.shape
    scaled = blocks_of(values_MK, rows, columns) * scale_RC[:, None, :, None]
    largest = torch.finfo(fp8).max
    cast = scaled.clamp(-largest, largest).to(fp8).view(torch.uint8)
    return cast.view(cast.size(0) * rows, cast.size(2) * columns)[:height, :width]


def quantize_blocks(
    values_MK: Tensor, rows: int, columns: int, fp8: torch.dtype, *, power_of_two: bool, epsilon: float, infinite: float
) -> tuple[Tensor, Tensor]:
    """Block scaling: uint8 [M, K], and fp32 [R, C] which the values are multiplied with again."""
    amax_RC = blocks_of(values_MK, rows, columns).abs().amax((1, 3))
    largest = torch.finfo(fp8).max
    scale_RC = scale_of(amax_RC, largest, power_of_two=power_of_two, epsilon=epsilon, infinite=infinite)
    return cast_blocks(values_MK, scale_RC, rows, columns, fp8), 1 / scale_RC


def quantize_mx(values_MK: Tensor, rows: int, columns: int, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """MXFP8: uint8 [M, K], and the exponents of the scales, E8M0 as uint8 [R, C]."""
    amax_RC = blocks_of(values_MK, rows, columns).abs().amax((1, 3))
    bits_RC = (amax_RC * (1 / torch.finfo(fp8).max)).view(torch.int32)
    exponent_RC = bits_RC >> 23
    rounded_up = (bits_RC & 0x7FFFFF > 0) & (exponent_RC != 0xFE) & ((exponent_RC > 0) | (bits_RC > 0x400000))
    exponent_RC = (exponent_RC + rounded_up).clamp_max(0xFE)
    # 2^(127 - e) as fp32 bits; e = 254 would be the subnormal 2^-127
    reciprocal_RC = torch.where(exponent_RC == 254, 0x400000, (254 - exponent_RC) << 23).int().view(torch.float32)
    return cast_blocks(values_MK, reciprocal_RC, rows, columns, fp8), exponent_RC.to(torch.uint8)


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., K] -> fp32 [M, K]."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False
) -> Any:
    """A quantised tensor of `quantizer` with memory but no values yet."""
    # Imported here and below: TransformerEngine imports the stand-in first.
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    shape = torch.Size(shape)
    return QuantizedTensorStorage.__tensor_unflatten__(
        quantizer.alloc_tensors(shape, device=device),
        quantizer.create_metadata(shape, dtype=dtype),
        shape,
        torch.empty(shape, device="meta").stride(),
    )


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """Quantise into `out`, or a new tensor, all the copies that it holds.

    Raises:
        NotImplementedError: a quantizer other than current, block and MXFP8 scaling.
    """
    if noop is not None and noop.item() == 1:
        return out
    kind = type(quantizer).__name__
    if kind not in _KINDS:
        raise NotImplementedError(f"{kind} needs a GPU: the stand-in does not emulate it")
    if out is None:
        out = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype)
    _KINDS[kind](tensor, quantizer, out)
    return out


def _quantize_block(tensor: Tensor, quantizer: Any, out: Any) -> None:
    values_MK, fp8 = as_matrix(tensor), TORCH_TYPE[int(quantizer.dtype)]
    square = quantizer.block_scaling_dim == 2
    for copy, matrix in (("rowwise", values_MK), ("columnwise", values_MK.T.contiguous())):
        data, scales = getattr(out, f"_{copy}_data"), getattr(out, f"_{copy}_scale_inv")
        if data is None:
            continue
        quantized, scale_RC = quantize_blocks(
            matrix,
            BLOCK if square else 1,
            BLOCK,
            fp8,
            power_of_two=quantizer.force_pow_2_scales,
            epsilon=quantizer.amax_epsilon,
            infinite=torch.finfo(tensor.dtype).max,
        )
        data.copy_(quantized.view(data.shape))
        _store_padded(scales, scale_RC if square else scale_RC.T)  # cuBLAS reads the scales of rows transposed


def _quantize_mxfp8(tensor: Tensor, quantizer: Any, out: Any) -> None:
    assert not quantizer.with_2d_quantization, "not emulated"
    values_MK, fp8 = as_matrix(tensor), TORCH_TYPE[int(quantizer.dtype)]
    if values_MK.size(0) % MX_BLOCK or values_MK.size(1) % MX_BLOCK:
        raise RuntimeError(f"MXFP8 needs multiples of {MX_BLOCK}, not {tuple(tensor.shape)}")
    for copy, block in (("rowwise", (1, MX_BLOCK)), ("columnwise", (MX_BLOCK, 1))):
        data, scales = getattr(out, f"_{copy}_data"), getattr(out, f"_{copy}_scale_inv")
        if data is None:
            continue
        quantized, exponent_RC = quantize_mx(values_MK, *block, fp8)
        data.copy_(quantized.view(data.shape))
        _store_padded(scales, exponent_RC)


def _quantize_tensor(tensor: Tensor, quantizer: Any, out: Any) -> None:
    values_MK, fp8 = as_matrix(tensor), TORCH_TYPE[int(quantizer.dtype)]
    amax = values_MK.abs().amax() if values_MK.numel() else values_MK.new_zeros(())
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = scale_of(
        amax,
        torch.finfo(fp8).max,
        power_of_two=quantizer.force_pow_2_scales,
        epsilon=quantizer.amax_epsilon,
        infinite=torch.finfo(torch.float32).max,
    )
    quantized = (
        cast_blocks(values_MK, scale.view(1, 1), values_MK.size(0), values_MK.size(1), fp8)
        if values_MK.numel()
        else values_MK
    )
    out._scale_inv.fill_(1 / scale)
    if out._data is not None:
        out._data.copy_(quantized.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(quantized.T.reshape(out._transpose.shape))
        out._transpose_invalid = False


_KINDS = {
    "Float8BlockQuantizer": _quantize_block,
    "MXFP8Quantizer": _quantize_mxfp8,
    "Float8CurrentScalingQuantizer": _quantize_tensor,
}


def _store_padded(scales: Tensor, values: Tensor) -> None:
    scales.zero_()
    scales[: values.size(0), : values.size(1)] = values


def dequantize(tensor: Any, otype: int) -> Tensor:
    """The values of a quantised tensor in its own shape."""
    columnwise = getattr(tensor, "_rowwise_data", 0) is None
    return matrix_of(tensor, columnwise=columnwise).reshape(tensor.size()).to(TORCH_TYPE[int(otype)])


def matrix_of(tensor: Any, *, columnwise: bool) -> Tensor:
    """fp32 [M, K], as a GEMM sees the tensor's rowwise or its columnwise copy; any plain tensor as it is."""
    kind = type(tensor).__name__
    if kind.startswith(("Float8Block", "MXFP8")):
        copy = "columnwise" if columnwise else "rowwise"
        data, scales = getattr(tensor, f"_{copy}_data"), getattr(tensor, f"_{copy}_scale_inv")
        if data is None:
            raise RuntimeError(f"{kind} has no {copy} copy")
        decode = _block_values if kind.startswith("Float8Block") else _mxfp8_values
        return decode(tensor, data, scales, columnwise)
    if kind.startswith("Float8"):
        if tensor._data is not None:
            data = tensor._data.reshape(-1, tensor._data.shape[-1])
        else:
            data = tensor._transpose.reshape(tensor._transpose.shape[0], -1).T.contiguous()
        return data.view(TORCH_TYPE[int(tensor._fp8_dtype)]).float() * tensor._scale_inv
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _block_values(tensor: Any, data: Tensor, scales: Tensor, columnwise: bool) -> Tensor:
    # The columnwise copy is the transpose, quantised along the rows that it then has.
    matrix = data.reshape(data.shape[0], -1) if columnwise else data.reshape(-1, data.shape[-1])
    rows = BLOCK if tensor._is_2D_scaled else 1
    scale_RC = scales if tensor._is_2D_scaled else scales.T
    values = matrix.view(TORCH_TYPE[int(tensor._fp8_dtype)]).float() * _spread(scale_RC, rows, BLOCK, matrix)
    return values.T if columnwise else values


def _mxfp8_values(tensor: Any, data: Tensor, scales: Tensor, columnwise: bool) -> Tensor:
    matrix = data.reshape(-1, data.shape[-1])
    block = (MX_BLOCK, 1) if columnwise else (1, MX_BLOCK)
    scale_RC = torch.exp2(scales.float() - 127)
    return matrix.view(TORCH_TYPE[int(tensor._fp8_dtype)]).float() * _spread(scale_RC, *block, matrix)


def _spread(scale_RC: Tensor, rows: int, columns: int, like: Tensor) -> Tensor:
    """Each block's scale at each of its values, [M, K]; scales behind the matrix are padding."""
    return scale_RC.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: like.size(0), : like.size(1)]

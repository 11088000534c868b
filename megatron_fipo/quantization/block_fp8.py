"""Weights in FP8 (E4M3) with a scale per block, bit for bit as TransformerEngine's quantisers compute them.

`block_fp8` is Float8BlockQuantizer's two-dimensional form (a scale per 128 x 128), `mxfp8` the row-wise form of
MXFP8Quantizer (a power of two per 32 values of a row). Rounding is to nearest, ties to even. Nothing has to be
saturated: by construction |weight x scale| <= 448 (1 + 2^-23), which rounds to 448, the largest E4M3 number.
"""

import torch
from torch import Tensor

from megatron_fipo.errors import UserError

BLOCK = 128
MX_BLOCK = 32
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448


def block_fp8(
    weight: Tensor, *, block: int = BLOCK, power_of_two: bool, name: str = "the weight"
) -> tuple[Tensor, Tensor]:
    """Quantise in square blocks; those at the lower and right edge may be cut off.

    The scale of a block is 448 / max |weight|, of which ``power_of_two`` keeps the exponent alone (rounded down, so
    that nothing overflows); 1 for a block of zeros, and the largest number of the weight's dtype where the quotient
    overflows (TransformerEngine, common/recipe/recipe_common.cuh).

    Args:
        weight: [out, in] in fp32, bf16 or fp16.
        name: for the error.

    Returns:
        E4M3 [out, in], and fp32 [ceil(out / block), ceil(in / block)] by which it must be multiplied (1 / scale).

    Raises:
        UserError: the weight has NaN or infinite values.
    """
    rows, columns = weight.shape
    padded = weight
    if rows % block or columns % block:
        padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    amax = _amax(blocks, (1, 3), name)
    scale = torch.full_like(amax, E4M3_MAX).div_(amax)  # a Python number / tensor would round twice
    scale.nan_to_num_(posinf=torch.finfo(weight.dtype).max).masked_fill_(amax == 0, 1.0)
    if power_of_two:
        scale.view(torch.int32).bitwise_and_(-(1 << 23))  # sign and exponent
    quantised = _scale(blocks, scale[:, None, :, None]).view(padded.shape)
    return quantised[:rows, :columns].contiguous(), scale.reciprocal_()


def mxfp8(weight: Tensor, *, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """Quantise in rows of 32 values with the scale of the OCP microscaling format: 2^e, held as e + 127.

    2^e is max |weight| / 448 rounded up to a power of two, at least 2^-127 (TransformerEngine, common/util/ptx.cuh).

    Args:
        weight: [out, in] in fp32, bf16 or fp16; ``in`` a multiple of 32.
        name: for the error.

    Returns:
        E4M3 [out, in] and uint8 (E8M0) [out, in / 32]; the value is E4M3 x 2^(E8M0 - 127).

    Raises:
        UserError: the weight has NaN or infinite values, or rows of another length.
    """
    rows, columns = weight.shape
    if columns % MX_BLOCK:
        raise UserError(f"{name} has rows of {columns} values, MXFP8 needs a multiple of {MX_BLOCK}: use block FP8")
    blocks = weight.reshape(rows, columns // MX_BLOCK, MX_BLOCK)
    amax = _amax(blocks, (2,), name)
    bits = (amax * (1 / E4M3_MAX)).view(torch.int32)
    half_of_least = 0x400000  # of a subnormal's mantissa: 2^-127, the least power of two that E8M0 has
    exponent = torch.where(bits >= 1 << 23, bits + (1 << 23) - 1, bits + half_of_least - 1) >> 23
    scale = ((254 - exponent) << 23).view(torch.float32)  # 2^-e
    return _scale(blocks, scale[:, :, None]).view(rows, columns), exponent.to(torch.uint8)


def dequantize(quantised: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that either quantiser stands for, [..., out, in] in ``dtype``; the product is rounded once.

    Args:
        quantised: E4M3 [..., out, in].
        scale_inv: fp32 with a scale per 128 x 128, or uint8 with one per 1 x 32.
    """
    rows, columns = quantised.shape[-2:]
    if scale_inv.dtype == torch.uint8:
        scale, block = torch.exp2(scale_inv.float() - 127), (1, MX_BLOCK)
    else:
        scale, block = scale_inv, (BLOCK, BLOCK)
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (quantised.float() * scale).to(dtype)


def _amax(blocks: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    """max |x| over ``dims`` in fp32, without a copy of x. Raises UserError if x has NaNs or infinities."""
    amax = torch.maximum(blocks.amax(dims), -blocks.amin(dims)).float().abs()  # 0 may be -0
    if not amax.isfinite().all():
        raise UserError(f"{name} has NaN or infinite values, which no FP8 number stands for: go back to good weights")
    return amax


def _scale(blocks: Tensor, scale: Tensor) -> Tensor:
    """blocks x scale in E4M3, a panel of the first axis at a time: its fp32 copy stays in cache, or small on a GPU."""
    quantised = torch.empty(blocks.shape, dtype=E4M3, device=blocks.device)
    values = 2**25 if blocks.is_cuda else 2**17
    panel = max(1, values * blocks.shape[0] // max(1, blocks.numel()))
    for source, factor, target in zip(blocks.split(panel), scale.split(panel), quantised.split(panel), strict=True):
        target.copy_(source.float() * factor)
    return quantised

"""The stand-in's quantisation, byte by byte, against loops that follow the definition; and what it refuses."""

import itertools
import math

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

TYPES = {tex.DType.kFloat8E4M3: torch.float8_e4m3fn, tex.DType.kFloat8E5M2: torch.float8_e5m2}


def awkward_values(rows: int, columns: int) -> torch.Tensor:
    """Magnitudes over the whole range of bf16: zeros, denormals, blocks of zeros, powers of two, the largest number."""
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (rows, 1), generator=generator).float()
    )
    values[0] = 0.0
    values[1, 0], values[1, 1:] = 448.0, 2.0**-9
    values[2] = 2.0**-130
    values[3, ::3] = torch.finfo(torch.bfloat16).max
    values[rows // 2 :, columns // 2 :] *= 1e-3
    values[-1, -20:] = 0.0
    return values.bfloat16()


def expected_block(block: torch.Tensor, fp8: torch.dtype, power_of_two: bool) -> tuple[torch.Tensor, float]:
    """FP8 bytes and the multiplier that undoes the scale."""
    largest, amax = torch.finfo(fp8).max, block.abs().max().float()
    scale = torch.tensor(1.0)
    if amax > 0:
        scale = torch.tensor(largest) / amax
        if scale.isinf():
            scale = torch.tensor(torch.finfo(torch.bfloat16).max)
        if power_of_two:
            scale = torch.tensor(2.0 ** (math.frexp(float(scale))[1] - 1))
    return (block.float() * scale).clamp(-largest, largest).to(fp8).view(torch.uint8), float(1 / scale)


def check_blocks(dtype: tex.DType, square: bool, power_of_two: bool) -> None:
    fp8, height = TYPES[dtype], 128 if square else 1
    for shape in ((144, 264), (34, 16)):
        x = awkward_values(*shape)
        quantizer = Float8BlockQuantizer(
            dtype, rowwise=True, columnwise=True, block_scaling_dim=1 + square, force_pow_2_scales=power_of_two
        )
        found = quantizer(x)
        for name, matrix in (("rowwise", x), ("columnwise", x.T)):
            data, scales = getattr(found, f"_{name}_data"), getattr(found, f"_{name}_scale_inv")
            assert data.shape == matrix.shape
            for i in range(0, matrix.size(0), height):
                for j in range(0, matrix.size(1), 128):
                    block = (slice(i, i + height), slice(j, j + 128))
                    values, multiplier = expected_block(matrix[block], fp8, power_of_two)
                    assert torch.equal(data[block], values), (name, i, j)
                    where = (i // 128, j // 128) if square else (j // 128, i)
                    assert float(scales[where]) == multiplier, (name, i, j)
                    if name == "rowwise":
                        wanted = (values.view(fp8).float() * multiplier).bfloat16()
                        assert torch.equal(found.dequantize()[block], wanted), (i, j)


def check_mxfp8(dtype: tex.DType) -> None:
    fp8 = TYPES[dtype]
    largest = torch.finfo(fp8).max
    x = awkward_values(64, 96)
    found = MXFP8Quantizer(dtype, rowwise=True, columnwise=True)(x)
    for data, scales, matrix in (
        (found._rowwise_data, found._rowwise_scale_inv, x),
        (found._columnwise_data.T, found._columnwise_scale_inv.T, x.T),
    ):
        for i in range(matrix.size(0)):
            for j in range(0, matrix.size(1), 32):
                block = matrix[i, j : j + 32].float()
                quotient = float(block.abs().max() * torch.tensor(1 / largest))
                # 2^e is the smallest power of two, from 2^-127, that is not below the quotient
                exponent = max(-127, math.ceil(math.log2(quotient))) if quotient else -127
                assert int(scales[i, j // 32]) == exponent + 127, (i, j, quotient)
                values = (block.double() * 2.0**-exponent).clamp(-largest, largest).float().to(fp8)
                assert torch.equal(data[i, j : j + 32], values.view(torch.uint8)), (i, j)


def check_tensorwise(dtype: tex.DType) -> None:
    x = awkward_values(64, 48)
    found = Float8CurrentScalingQuantizer(dtype, torch.device("cpu"), rowwise=True, columnwise=True)(x)
    values, multiplier = expected_block(x, TYPES[dtype], power_of_two=False)
    assert torch.equal(found._data, values) and torch.equal(found._transpose, values.T)
    assert float(found._scale_inv) == multiplier


def check_refusals() -> None:
    """What TransformerEngine and cuBLAS refuse is refused here, and names what is wrong."""
    linear = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16)

    def message(rows: int, recipe: recipes.Recipe) -> str:
        try:
            with te.autocast(enabled=True, recipe=recipe):
                linear(torch.randn(rows, 128, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    assert "divisible by 8" in message(20, recipes.Float8BlockScaling())
    assert "multiple of 16" in message(24, recipes.Float8BlockScaling())  # of the gradient of the weight
    assert message(32, recipes.Float8BlockScaling()) == ""
    assert "capability 10.0" in message(32, recipes.MXFP8BlockScaling())
    one = torch.ones(1)
    try:
        Float8Quantizer(one, one, tex.DType.kFloat8E4M3)(torch.randn(16, 16))  # of delayed scaling
    except NotImplementedError as error:
        assert "needs a GPU" in str(error), error
    else:
        raise AssertionError("delayed scaling is not emulated")


def cases() -> dict:
    found = {"refusals": check_refusals}
    for dtype, fp8 in TYPES.items():
        found[f"MXFP8 {fp8}"] = lambda dtype=dtype: check_mxfp8(dtype)
        found[f"per tensor {fp8}"] = lambda dtype=dtype: check_tensorwise(dtype)
        for square, power in itertools.product((True, False), repeat=2):
            name = f"blocks {'128x128' if square else '1x128'} {fp8} {'powers of two' if power else 'fp32 scales'}"
            found[name] = lambda dtype=dtype, square=square, power=power: check_blocks(dtype, square, power)
    return found

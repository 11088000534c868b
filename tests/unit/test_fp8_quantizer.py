"""The FP8 quantisers against loops that follow the definitions number by number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.errors import UserError
from megatron_fipo.quantization.block_fp8 import E4M3, block_fp8, dequantize, mxfp8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (1.0, 1e-4, 1e-6, 1e-20, 1e-36, 1e-38, 3e-41, 1e30)  # the last but one: subnormal fp32 and bf16

E4M3_NUMBERS = torch.arange(127, dtype=torch.uint8).view(E4M3).double().tolist()  # 0 to 448


def random_weight(shape, dtype, magnitude, seed):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = 0
    return weight.nan_to_num_(posinf=0, neginf=0)


def e4m3(value: float) -> int:
    """The E4M3 code of a number, rounded to nearest even, by comparing with all codes."""
    distance = [abs(number - abs(value)) for number in E4M3_NUMBERS]
    least = min(distance)
    code = min((code for code, d in enumerate(distance) if d == least), key=lambda code: code & 1)
    return code | (128 if math.copysign(1, value) < 0 else 0)


def block_loop(weight, block, power_of_two):
    """One block after the other in numpy's fp32."""
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    values = weight.float().numpy()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = values[i * block : (i + 1) * block, j * block : (j + 1) * block]
            amax = np.abs(part).max()
            with np.errstate(divide="ignore", over="ignore"):
                scale = np.float32(448) / amax if amax else np.float32(1)
            if np.isinf(scale):
                scale = np.float32(torch.finfo(weight.dtype).max)
            if power_of_two:
                scale = np.float32(2.0 ** (math.frexp(scale)[1] - 1))
            scaled = part * scale
            codes[i * block : (i + 1) * block, j * block : (j + 1) * block] = torch.tensor(
                [[e4m3(float(x)) for x in row] for row in scaled], dtype=torch.uint8
            )
            scales[i, j] = float(np.float32(1) / scale)
    return codes, scales


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    block=st.sampled_from([1, 3, 8]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from(MAGNITUDES),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocks_are_those_of_a_loop(shape, block, dtype, magnitude, power_of_two, seed):
    weight = random_weight(shape, dtype, magnitude, seed)
    codes, scales = block_loop(weight, block, power_of_two)
    quantised, scale_inv = block_fp8(weight, block=block, power_of_two=power_of_two)
    assert quantised.dtype == E4M3 and quantised.is_contiguous() and scale_inv.dtype == torch.float32
    assert torch.equal(quantised.view(torch.uint8), codes)
    assert torch.equal(scale_inv, scales)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(256, 384), (129, 128), (300, 70), (1, 1)])
def test_what_it_stands_for_is_near(shape, power_of_two):
    """Half a unit in the last place of the largest numbers: 2^-4 of a block's maximum, at its finest 2^-10 of it."""
    weight = random_weight(shape, torch.bfloat16, 1.0, 5)
    back = dequantize(*block_fp8(weight, power_of_two=power_of_two))
    error = (back - weight.float()).abs()
    assert (error <= weight.float().abs() * 2**-4 + weight.abs().max().float() * 2**-16).all()
    assert error.max() > 0


def test_large_weights_in_panels():
    """More than one panel, cut anywhere: every block is the same as alone."""
    weight = random_weight((1100, 700), torch.bfloat16, 1.0, 6)
    quantised, scale_inv = block_fp8(weight, power_of_two=False)
    for i in range(9):
        alone, scale = block_fp8(weight[i * 128 : i * 128 + 128, 256:384], power_of_two=False)
        part = quantised[i * 128 : i * 128 + 128, 256:384]
        assert torch.equal(alone.view(torch.uint8), part.view(torch.uint8)) and scale == scale_inv[i, 2]


def test_strided_weights():
    weight = random_weight((300, 200), torch.bfloat16, 1.0, 7)
    for view in (weight.t(), weight[::2, 3:77]):
        for ours, theirs in zip(
            block_fp8(view, power_of_two=True), block_fp8(view.contiguous(), power_of_two=True), strict=True
        ):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def mxfp8_loop(weight):
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    exponents = torch.empty(rows, columns // 32, dtype=torch.uint8)
    values = weight.float().numpy()
    for i in range(rows):
        for j in range(columns // 32):
            part = values[i, 32 * j : 32 * j + 32]
            ideal = float(np.abs(part).max() * np.float32(1 / 448))
            exponent = 0 if ideal == 0 else max(0, math.ceil(math.log2(ideal)) + 127)  # log2 is exact at powers of two
            scale = np.float32(2.0 ** (127 - exponent))
            codes[i, 32 * j : 32 * j + 32] = torch.tensor([e4m3(float(x * scale)) for x in part], dtype=torch.uint8)
            exponents[i, j] = exponent
    return codes, exponents


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from(MAGNITUDES),
    seed=st.integers(0, 2**31),
)
def test_mxfp8_is_that_of_a_loop(shape, dtype, magnitude, seed):
    weight = random_weight((shape[0], 32 * shape[1]), dtype, magnitude, seed)
    codes, exponents = mxfp8_loop(weight)
    quantised, scale = mxfp8(weight)
    assert torch.equal(scale, exponents)
    assert torch.equal(quantised.view(torch.uint8), codes)


@pytest.mark.parametrize("exponent", [-127, -126, -20, 0, 20])
def test_mxfp8_at_powers_of_two(exponent):
    """max |x| = 448 x 2^e needs exactly 2^e, and the next larger number the power behind it."""
    weight = torch.zeros(2, 32, dtype=torch.float64)
    weight[:, 0] = 448 * 2.0**exponent
    weight = weight.float()
    weight[1, 0] = torch.nextafter(weight[1, 0], torch.tensor(math.inf))
    quantised, scale = mxfp8(weight)
    assert scale[0].item() == exponent + 127
    assert scale[1].item() in (exponent + 127, exponent + 128)  # x / 448 may round back to the power of two
    assert quantised[0, 0].item() == 448


def test_both_stand_for_zeros():
    for quantised, scale in (block_fp8(torch.zeros(130, 32), power_of_two=False), mxfp8(torch.zeros(130, 32))):
        assert not quantised.view(torch.uint8).any() and not dequantize(quantised, scale).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused_by_name(value, dtype):
    weight = torch.ones(200, 160, dtype=dtype)
    weight[199, 131] = value
    for power_of_two in (True, False):
        with pytest.raises(UserError, match="model.layers.3.mlp.up_proj.weight has NaN or infinite"):
            block_fp8(weight, power_of_two=power_of_two, name="model.layers.3.mlp.up_proj.weight")
    with pytest.raises(UserError, match="model.layers.3.mlp.up_proj.weight has NaN or infinite"):
        mxfp8(weight, name="model.layers.3.mlp.up_proj.weight")
    with pytest.raises(UserError, match="a.weight has rows of 33 values, MXFP8 needs a multiple of 32"):
        mxfp8(torch.ones(2, 33), name="a.weight")


def test_the_engine_reads_the_same_numbers():
    """SGLang's own expansion of the two tensors."""
    utils = pytest.importorskip("sglang.srt.layers.quantization.fp8_utils", reason="SGLang is not installed")
    weight = random_weight((300, 256), torch.bfloat16, 1.0, 8)
    pair = block_fp8(weight, power_of_two=False)
    assert torch.equal(dequantize(*pair, torch.bfloat16), utils.block_quant_dequant(*pair, [128, 128], torch.bfloat16))

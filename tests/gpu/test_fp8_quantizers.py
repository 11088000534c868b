"""TransformerEngine's kernels give the bytes that the stand-in for tests without a GPU computes (compat/te_cpu)."""

import pytest
import torch

from megatron_fipo.compat.te_cpu.quantization import quantize_blocks, quantize_mx

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
te = pytest.importorskip("transformer_engine.pytorch")


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 384, generator=generator).mul(torch.logspace(-4, 4, 384)).bfloat16()


@pytest.mark.skipif(not te.is_fp8_block_scaling_available(), reason="no block scaling on this GPU")
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_blocks(square, power_of_two):
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    x = values()
    quantizer = Float8BlockQuantizer(
        te.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=1 + square,
        force_pow_2_scales=power_of_two,
    )  # fmt: skip
    found = quantizer(x.cuda())
    data, scale_RC = quantize_blocks(
        x.float(), 128 if square else 1, 128, torch.float8_e4m3fn, power_of_two=power_of_two, epsilon=0.0,
        infinite=torch.finfo(torch.bfloat16).max,
    )  # fmt: skip
    scales = found._rowwise_scale_inv.cpu() if square else found._rowwise_scale_inv.cpu().T
    assert torch.equal(found._rowwise_data.cpu(), data)
    assert torch.equal(scales[: scale_RC.size(0), : scale_RC.size(1)], scale_RC)


@pytest.mark.skipif(not te.is_mxfp8_available(), reason="no MXFP8 on this GPU")
def test_mxfp8():
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    x = values()
    found = MXFP8Quantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=False)(x.cuda())
    data, exponent_RC = quantize_mx(x.float(), 1, 32, torch.float8_e4m3fn)
    scales = found._rowwise_scale_inv.cpu().view(torch.uint8)[: exponent_RC.size(0), : exponent_RC.size(1)]
    assert torch.equal(scales, exponent_RC) and torch.equal(found._rowwise_data.cpu(), data)

"""Our FP8 weights, bit for bit, against TransformerEngine's quantisers; in the te-cpu environment."""

import argparse

from megatron_fipo.compat import te_cpu

te_cpu.install("hopper")

import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402, F401 (imports the quantisers)
import transformer_engine_torch as tex  # noqa: E402
from transformer_engine.common.recipe import Float8BlockScaling  # noqa: E402
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer  # noqa: E402
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer  # noqa: E402

from megatron_fipo.model.fp8_training import fp8_settings  # noqa: E402
from megatron_fipo.quantization.block_fp8 import block_fp8, mxfp8  # noqa: E402

E4M3 = tex.DType.kFloat8E4M3


def weights(rows: int, columns: int):
    """Ordinary ones; over the whole range of exponents, subnormal ones and the largest included; zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    normal = torch.randn(rows, columns, generator=generator)
    exponents = torch.randint(-148, 126, (rows, 1), generator=generator).double()
    for values in (0.02 * normal, normal.double() * torch.exp2(exponents), torch.zeros(rows, columns)):
        for dtype in (torch.bfloat16, torch.float32):
            yield values.to(dtype).nan_to_num_(posinf=1.0, neginf=-1.0)


def check(ours, data, scale) -> None:
    quantised, scale_inv = ours
    assert torch.equal(quantised.view(torch.uint8), data)
    rows, columns = scale_inv.shape  # theirs is padded
    assert torch.equal(scale_inv, scale[:rows, :columns])


def main() -> None:
    for power_of_two in (True, False):
        quantizer = Float8BlockQuantizer(
            E4M3, rowwise=True, columnwise=True, block_scaling_dim=2, force_pow_2_scales=power_of_two
        )
        for shape in ((256, 384), (130, 144), (64, 528), (384, 16)):
            for weight in weights(*shape):
                theirs = quantizer(weight)
                check(block_fp8(weight, power_of_two=power_of_two), theirs._rowwise_data, theirs._rowwise_scale_inv)
    for shape in ((64, 96), (256, 128), (32, 32)):
        for weight in weights(*shape):
            theirs = MXFP8Quantizer(E4M3, rowwise=True, columnwise=True)(weight)
            check(mxfp8(weight), theirs._rowwise_data, theirs._rowwise_scale_inv.view(torch.uint8))
    # Scales are rounded as the environment tells TransformerEngine's recipe.
    flags = {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_backward": "native", "first_last_layers_bf16": False}
    recipe = Float8BlockScaling()
    assert recipe.w_block_scaling_dim == 2 and recipe.fp8_quant_fwd_weight.amax_epsilon == 0
    settings = fp8_settings(argparse.Namespace(**flags))
    assert settings.power_of_two_scales == recipe.fp8_quant_fwd_weight.power_2_scale
    print("power of two" if recipe.fp8_quant_fwd_weight.power_2_scale else "fp32")


if __name__ == "__main__":
    main()

"""An SGLang server that holds block-FP8 weights without a GPU: `python -m fp8_server FLAGS`, in the place of `launch`.

SGLang's CPU path packs FP8 weights for AMX and asserts that the processor has it. Here it takes its CUDA path instead:
parameters, loaders, update sessions, what follows loading, and checksums are its own. Of all that only the products of
matrices are CUDA kernels; they are torch's, with the weights' values and activations in bf16.
"""

import sys
from types import SimpleNamespace

import torch

from megatron_fipo.rollout.sglang import launch
from megatron_fipo.rollout.sglang.launch import ADMIN_KEY, API_KEY  # noqa: F401 (`servers` asks its launcher for them)

# Behind `launch`, which puts the stand-in for SGLang's CUDA kernels in place.
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native  # isort: skip
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput  # isort: skip
from sglang.srt.layers.quantization import fp8, fp8_utils  # isort: skip


def block_linear(input, weight, block_size, weight_scale, input_scale=None, bias=None):
    values = fp8_utils.block_quant_dequant(weight, weight_scale, block_size, input.dtype)
    return torch.nn.functional.linear(input, values, bias)


def block_experts(method, layer, dispatch_output):
    tokens = dispatch_output.hidden_states
    values = {
        name: fp8_utils.block_quant_dequant(
            getattr(layer, name), getattr(layer, f"{name}_scale_inv"), [128, 128], tokens.dtype
        )
        for name in ("w13_weight", "w2_weight")
    }
    experts = SimpleNamespace(num_experts=layer.num_experts, **values)
    output = moe_forward_native(experts, tokens, dispatch_output.topk_output, method.moe_runner_config)
    return StandardCombineInput(hidden_states=output)


fp8._is_cpu = False
fp8.dispatch_w8a8_block_fp8_linear = lambda **_: block_linear
fp8.Fp8MoEMethod.apply = block_experts

if __name__ == "__main__":
    sys.exit(launch.main())

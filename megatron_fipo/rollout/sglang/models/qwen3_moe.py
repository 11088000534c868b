"""Qwen3-MoE with dense layers among those with experts.

SGLang has a dense branch in its layer but gives every layer experts, whatever the configuration says. Here it asks the
configuration, as transformers does, and the dense branch takes the argument that the layer passes to experts.
"""

from typing import Any

from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn
from sglang.srt.models import qwen3_moe
from torch import Tensor


def has_experts(config: Any, layer: int) -> bool:
    """Whether the layer (from 0) is a mixture of experts."""
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % config.decoder_sparse_step == 0


def stage_facts(config: Any, layer_id: int) -> tuple[Any, Any]:
    """What Qwen3MoeDecoderLayer.stage_facts tells, of the layer as it is."""
    return declare_attn(), declare_ffn(
        sparse=has_experts(config, layer_id), next_layer_sparse=has_experts(config, layer_id + 1)
    )


class DenseMLP(qwen3_moe.Qwen3MoeMLP):
    """Called like the experts of the other layers."""

    def forward(self, x: Tensor, forward_batch: Any = None) -> Tensor:
        """[tokens, hidden] -> the same, a summand of each rank."""
        return super().forward(x)


qwen3_moe.Qwen3MoeDecoderLayer.stage_facts = staticmethod(stage_facts)
qwen3_moe.Qwen3MoeMLP = DenseMLP

EntryClass = qwen3_moe.Qwen3MoeForCausalLM

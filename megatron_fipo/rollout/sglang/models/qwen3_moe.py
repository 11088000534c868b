"""Qwen3-MoE with dense layers among those with experts.

SGLang has both kinds of layer and gives every layer experts, whatever the configuration says: where it asks which kind
a layer is, this answers as transformers does.
"""

from typing import Any

from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn
from sglang.srt.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM


def has_experts(config: Any, layer: int) -> bool:
    """Whether the layer (from 0) is a mixture of experts."""
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % config.decoder_sparse_step == 0


def stage_facts(config: Any, layer_id: int) -> tuple[Any, Any]:
    """What Qwen3MoeDecoderLayer.stage_facts tells, of the layer as it is."""
    return declare_attn(), declare_ffn(
        sparse=has_experts(config, layer_id), next_layer_sparse=has_experts(config, layer_id + 1)
    )


Qwen3MoeDecoderLayer.stage_facts = staticmethod(stage_facts)

EntryClass = Qwen3MoeForCausalLM

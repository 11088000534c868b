"""The linear layers of a model under their Hugging Face names: what FP8 recipes and engines may quantise.

Embedding, head, norms, biases and the router of experts are none of them, with any recipe and in any engine.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

LINEAR_WEIGHT = re.compile(
    r"(?P<module>model\.layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|mlp\.(?:experts\.\d+\.)?(?:gate|up|down)_proj))\.weight"
)


def linear_weights(architecture: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer's weight, by name.

    Args:
        architecture: Megatron's arguments for the model (`model.hf_config.architecture`).
    """
    hidden, head = architecture["hidden_size"], architecture["kv_channels"]
    queries, keys = architecture["num_attention_heads"] * head, architecture["num_query_groups"] * head
    shapes: dict[str, tuple[int, int]] = {}
    for layer, has_experts in enumerate(_layers_with_experts(architecture)):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        shapes |= {
            f"{attention}{x}_proj.weight": (rows, hidden) for x, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
        shapes[f"{attention}o_proj.weight"] = (hidden, queries)
        parts, width = [mlp], architecture["ffn_hidden_size"]
        if has_experts:
            parts = [f"{mlp}experts.{expert}." for expert in range(architecture["num_experts"])]
            width = architecture["moe_ffn_hidden_size"]
        for part in parts:
            shapes |= {f"{part}{x}_proj.weight": (width, hidden) for x in ("gate", "up")}
            shapes[f"{part}down_proj.weight"] = (hidden, width)
    return shapes


def _layers_with_experts(architecture: Mapping[str, Any]) -> Iterable[bool]:
    layers, frequency = architecture["num_layers"], architecture.get("moe_layer_freq", 1)
    if not architecture.get("num_experts"):
        return [False] * layers
    return [True] * layers if frequency == 1 else map(bool, frequency)

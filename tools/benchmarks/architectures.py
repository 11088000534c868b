"""Published architectures as the config.json of a Hugging Face folder, for runs with random weights."""

from typing import Any

_QWEN2_5 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151936}
_COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768, "attention_dropout": 0.0}


def _shape(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: _COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | config
    for name, config in {
        "qwen3-3.4m": _QWEN3
        | _shape(6, 192, 512, 6, 2)
        | {"head_dim": 32, "vocab_size": 4096, "tie_word_embeddings": True},
        "qwen3-4b": _QWEN3 | _shape(36, 2560, 9728, 32, 8) | {"tie_word_embeddings": True},
        "qwen3-8b": _QWEN3 | _shape(36, 4096, 12288, 32, 8) | {"tie_word_embeddings": False},
        "qwen3-30b-a3b": _QWEN3
        | _shape(48, 2048, 6144, 32, 4)
        | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        "qwen2.5-7b": _QWEN2_5 | _shape(28, 3584, 18944, 28, 4) | {"vocab_size": 152064},
        "qwen2.5-32b": _QWEN2_5 | _shape(64, 5120, 27648, 40, 8) | {"vocab_size": 152064},
    }.items()
}

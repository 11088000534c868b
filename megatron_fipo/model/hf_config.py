"""A Hugging Face model folder as Megatron arguments."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_fipo.errors import UserError

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_INDEX = "model.safetensors.index.json"
_MAX_LAYERS = 10_000  # what is beyond is damage, and would be enumerated for minutes
# Megatron's --use-rope-scaling knows these values alone; the factor has a flag.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: no such folder or file, no JSON, or an architecture that we do not support.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: --hf-model wants a Hugging Face model folder with a config.json.")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download the model again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not an object: download the model again.")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"{path} has model_type {model_type!r}, which is not supported: use one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    return config


def weight_files(hf_dir: str | Path) -> list[Path]:
    """The folder's safetensors files, in the order of their names.

    Raises:
        UserError: there are none, the index names a file that is missing, or a file is truncated.
    """
    folder = Path(hf_dir)
    index = folder / _INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            raise UserError(f"{folder} has neither model.safetensors nor {_INDEX}: download the model's weights.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names {', '.join(missing)}, which the folder lacks: download the missing files.")
    for file in files:
        try:
            safe_open(file, framework="pt").keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no complete safetensors file ({error}): download it again.") from error
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) and name == Path(name).name for name in found.values()):
            raise TypeError("weight_map must name files of the folder")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no safetensors index ({error!r}): download it again.") from error


def megatron_arguments(hf_dir: str | Path) -> dict[str, Any]:
    """Megatron's arguments (name -> value, as in its parsed namespace) for the model in `hf_dir`.

    Checks the whole folder, so that an incomplete download fails here and not after the start-up.

    Raises:
        UserError: the folder is incomplete, or the model uses something that we do not support.
    """
    arguments = architecture(hf_dir)
    _check_layers(Path(hf_dir), arguments["num_layers"])
    if not any((Path(hf_dir) / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{hf_dir} has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}): download the model's tokenizer files."
        )
    return arguments


def _check_layers(folder: Path, num_layers: int) -> None:
    """Compare config.json and weights before a model is built of what the first says."""
    names = (name for file in weight_files(folder) for name in safe_open(file, framework="pt").keys())  # noqa: SIM118
    layers = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers and num_layers != max(layers) + 1:
        raise UserError(
            f"{folder / 'config.json'} has num_hidden_layers {num_layers}, where the weights have {max(layers) + 1} "
            f"layers: take config.json and weights from the same model."
        )


def architecture(hf_dir: str | Path) -> dict[str, Any]:
    """The same from config.json alone. Raises UserError, too."""
    config, path = read_hf_config(hf_dir), Path(hf_dir) / "config.json"
    _refuse_unsupported(config, path)
    layers = config.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= _MAX_LAYERS:
        raise UserError(
            f"{path} has num_hidden_layers {layers!r}, no number from 1 to {_MAX_LAYERS:,}: download config.json again."
        )
    try:
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        arguments = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
            "layernorm_epsilon": config["rms_norm_eps"],
            "max_position_embeddings": config["max_position_embeddings"],
            "vocab_size": config["vocab_size"],
        }
        if config["model_type"] == "qwen3_moe":
            arguments |= _mixture_of_experts(config)
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}: download the model's config.json again.") from error
    rope = _rope(config)
    return arguments | {
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] in ("qwen3", "qwen3_moe"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "rotary_base": rope["rope_theta"],
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": float(rope.get("factor", 1.0)),
        "rotary_percent": 1.0,
        "init_method_std": config.get("initializer_range", 0.02),
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _mixture_of_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE's routing: the softmax over all experts, its top-k, renormalised if `norm_topk_prob`."""
    layers = range(config["num_hidden_layers"])
    every, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    with_experts = [int(layer not in dense and (layer + 1) % every == 0) for layer in layers]
    return {
        "num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        "moe_layer_freq": 1 if all(with_experts) else with_experts,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        # A softmax over the chosen logits alone is the renormalised top-k of the softmax over all.
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_dtype": "fp32",
        "moe_enable_routing_replay": True,  # the updates take the experts of old_logp, see model/router_replay.py
        # No balancing loss: the gradient is the policy's alone, and pre-training has balanced the experts.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope | {"rope_type": rope.get("type", rope["rope_type"])}


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    family, rope = config["model_type"], _rope(config)
    rope_type = rope["rope_type"]
    layer_types = set(config.get("layer_types") or ["full_attention"])
    unsupported = {
        f"rope type {rope_type!r}": rope_type not in (("default", "llama3") if family == "llama" else ("default",)),
        "rope scaling other than Llama 3's": rope_type == "llama3" and {k: rope.get(k) for k in _LLAMA3} != _LLAMA3,
        "sliding-window attention": config.get("use_sliding_window", False) or layer_types != {"full_attention"},
        f"activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "attention_bias true": family != "qwen2" and config.get("attention_bias", False),
        "mlp_bias true": config.get("mlp_bias", False),
        "num_experts_per_tok 1 with norm_topk_prob true (every weight would be 1)": family == "qwen3_moe"
        and config.get("norm_topk_prob", False)
        and config.get("num_experts_per_tok") == 1,
        "attention_dropout": config.get("attention_dropout", 0.0) != 0.0,
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{path} asks for {feature}, which is not supported: use a model without it.")

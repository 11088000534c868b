"""Which Hugging Face tensors make up which Megatron tensor, and how both are cut for tensor parallelism.

Every Megatron parameter has a rule: the HF tensors it holds, how they are merged into Megatron's full tensor and split
again, and along which axis Megatron shards it. Names are global: layers count from 0 over all pipeline stages, experts
from 0 over all expert-parallel ranks, and both layer specs' names become one (:func:`global_name`).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"

# name below "decoder.layers.N." -> names below "model.layers.N.", in the order in which they are streamed
_ATTENTION = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
_ROUTER = {"mlp.router.weight": ("mlp.gate.weight",)}
# below "mlp.", or "mlp.experts.N." for one expert of a mixture
_MLP = {
    "linear_fc1.weight": ("gate_proj.weight", "up_proj.weight"),
    "linear_fc2.weight": ("down_proj.weight",),
}
# TransformerEngine's spec fuses a norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(.+\.weight)(\d+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")


def global_name(name: str, layers: Sequence[int], first_expert: int) -> str:
    """The global name of a parameter that the model's own ``named_parameters`` calls ``name``.

    Args:
        layers: the global numbers of the chunk's layers.
        first_expert: the global number of this rank's first expert in each layer.
    """
    layer = _LAYER_NAME.fullmatch(name)
    if layer is None:
        return name
    below = _FUSED_NORMS.get(layer[2], layer[2])
    if match := _LOCAL_EXPERT.fullmatch(below):
        below = f"mlp.experts.{first_expert + int(match[1])}.{match[2]}"
    elif match := _GROUPED_EXPERT.fullmatch(below):
        below = f"mlp.experts.{first_expert + int(match[2])}.{match[1]}"
    return f"decoder.layers.{layers[int(layer[1])]}.{below}"


def expert_of(name: str) -> int | None:
    """The global number of the expert to which the parameter with this global name belongs; None: to none."""
    layer = _LAYER_NAME.fullmatch(name)
    match = layer and _EXPERT.fullmatch(layer[2])
    return int(match[1]) if match else None


def for_expert(name: str, expert: int) -> str:
    """The global name of the same parameter of another expert."""
    return re.sub(r"mlp\.experts\.\d+\.", f"mlp.experts.{expert}.", name)


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter relates to HF.

    Attributes:
        hf_names: the HF tensors that it holds, in order.
        join: HF tensors -> Megatron's full tensor without its padding.
        split: full tensor -> HF tensors.
        tp_axis: the axis that tensor parallelism (of an expert: expert tensor parallelism) cuts; None: every rank
            holds all.
        tp_parts: equal blocks along `tp_axis` that are cut one by one (2 for gate and up).
        rows: Megatron pads axis 0 with zeros up to this; None: it does not.
        units: `join` keeps this many equal pieces of the HF tensors apart (the groups of q, k and v); None: any number.
    """

    hf_names: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    tp_axis: int | None = None
    tp_parts: int = 1
    rows: int | None = None
    units: int | None = None

    def merge(self, tensors: Sequence[Tensor], pieces: int = 1) -> Tensor:
        """Megatron's full tensor of the HF tensors; of a :meth:`piece` of each, one of that many shards."""
        joined = self.join(tensors)
        if self.rows is None:
            return joined
        return torch.nn.functional.pad(joined, (0, 0, 0, self.rows // pieces - joined.size(0)))

    def pieces(self, size: int) -> int:
        """Into how many pieces HF tensors can be cut for `size` tensor-parallel ranks: a divisor of `size`."""
        if self.tp_axis is None:
            return 1
        return size if self.units is None else math.gcd(size, self.units)

    def piece(self, hf_shape: Sequence[int], pieces: int, number: int) -> tuple[slice, ...]:
        """Where piece `number` of an HF tensor lies. Of a padded one, the last pieces can be short or empty."""
        if self.tp_axis is None:
            return ()
        length = (self.rows or hf_shape[self.tp_axis]) // pieces
        return (*[slice(None)] * self.tp_axis, slice(number * length, (number + 1) * length))

    def shard(self, full: Tensor, size: int, rank: int) -> Tensor:
        """What tensor-parallel rank `rank` of `size` holds of the full tensor."""
        if self.tp_axis is None or size == 1:
            return full
        blocks = full.chunk(self.tp_parts, self.tp_axis)
        return torch.cat([block.chunk(size, self.tp_axis)[rank] for block in blocks], self.tp_axis)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor from the shards of all tensor-parallel ranks."""
        if self.tp_axis is None or len(shards) == 1:
            return shards[0]
        axis = self.tp_axis
        blocks = zip(*(shard.chunk(self.tp_parts, axis) for shard in shards), strict=True)
        return torch.cat([torch.cat(block, axis) for block in blocks], axis)


class WeightMap:
    """The rules of one model. Covers Llama, Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

    def __init__(self, config: TransformerConfig, vocab_size: int, padded_vocab_size: int, tied: bool) -> None:
        """`vocab_size` rows of the embedding exist in HF; Megatron pads them with zeros to `padded_vocab_size`."""
        self.config = config
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.tied = tied

    def names(self) -> Iterator[str]:
        """The global names of the model's parameters in the order of the layers, without the copy of a tied weight."""
        absent = set()
        if not self.config.add_qkv_bias:
            absent.add("self_attention.linear_qkv.bias")
        if not self.config.qk_layernorm:
            absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
        yield EMBEDDING
        for layer in range(self.config.num_layers):
            prefix = f"decoder.layers.{layer}."
            yield from (prefix + below for below in _ATTENTION if below not in absent)
            if self.has_experts(layer):
                yield from (prefix + below for below in _ROUTER)
                for expert in range(self.config.num_moe_experts or 0):
                    yield from (f"{prefix}mlp.experts.{expert}.{below}" for below in _MLP)
            else:
                yield from (f"{prefix}mlp.{below}" for below in _MLP)
        yield FINAL_NORM
        if not self.tied:
            yield OUTPUT

    def has_experts(self, layer: int) -> bool:
        """True if the layer (from 0) is a mixture of experts, in Megatron's reading of ``moe_layer_freq``."""
        pattern = self.config.moe_layer_freq
        if self.config.num_moe_experts is None:
            return False
        return bool(pattern[layer]) if isinstance(pattern, list) else layer % pattern == 0

    def rule(self, name: str) -> Rule:
        """The rule for the Megatron parameter with the global name `name`.

        Raises:
            KeyError: no such parameter is known.
        """
        if name == EMBEDDING or (name == OUTPUT and self.tied):
            return self._vocab_rule("model.embed_tokens.weight")
        if name == OUTPUT:
            return self._vocab_rule("lm_head.weight")
        if name == FINAL_NORM:
            return Rule(("model.norm.weight",), _only, _alone)
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            raise KeyError(name)
        prefix, below = f"model.layers.{match[1]}.", match[2]
        if expert := _EXPERT.fullmatch(below):
            return self._mlp_rule(f"{prefix}mlp.experts.{expert[1]}.", expert[2])
        if below.startswith("mlp.linear"):
            return self._mlp_rule(f"{prefix}mlp.", below.removeprefix("mlp."))
        hf_names = tuple(prefix + hf for hf in (_ATTENTION | _ROUTER)[below])
        if below.startswith("self_attention.linear_qkv."):
            groups = self.config.num_query_groups
            return Rule(hf_names, self._join_qkv, self._split_qkv, tp_axis=0, units=groups)
        return Rule(hf_names, _only, _alone, tp_axis=1 if below == "self_attention.linear_proj.weight" else None)

    def _vocab_rule(self, hf_name: str) -> Rule:
        return Rule((hf_name,), _only, lambda full: (full[: self.vocab_size],), tp_axis=0, rows=self.padded_vocab_size)

    def _mlp_rule(self, prefix: str, below: str) -> Rule:
        hf_names = tuple(prefix + hf for hf in _MLP[below])
        if len(hf_names) == 1:
            return Rule(hf_names, _only, _alone, tp_axis=1)
        return Rule(hf_names, lambda parts: torch.cat(list(parts)), lambda full: full.chunk(2), tp_axis=0, tp_parts=2)

    def hf_names(self) -> Iterator[str]:
        """Every HF tensor of the model, in the order of :meth:`names`."""
        for name in self.names():
            yield from self.rule(name).hf_names

    def hf_shape(self, hf_name: str) -> tuple[int, ...]:
        """The shape that the HF tensor must have."""
        c = self.config
        assert c.kv_channels is not None and c.num_query_groups is not None and c.ffn_hidden_size is not None
        head_rows = {"q": c.num_attention_heads * c.kv_channels}
        head_rows["k"] = head_rows["v"] = c.num_query_groups * c.kv_channels
        if hf_name in ("model.embed_tokens.weight", "lm_head.weight"):
            return (self.vocab_size, c.hidden_size)
        if match := re.search(r"self_attn\.([qkv])_proj\.(weight|bias)", hf_name):
            return (head_rows[match[1]], c.hidden_size)[: 2 if match[2] == "weight" else 1]
        if "_norm." in hf_name:
            return (c.kv_channels,)
        if "o_proj" in hf_name:
            return (c.hidden_size, head_rows["q"])
        if hf_name.endswith("mlp.gate.weight"):
            assert c.num_moe_experts is not None
            return (c.num_moe_experts, c.hidden_size)
        width = c.moe_ffn_hidden_size if ".experts." in hf_name else c.ffn_hidden_size
        assert width is not None
        if "down_proj" in hf_name:
            return (c.hidden_size, width)
        if "gate_proj" in hf_name or "up_proj" in hf_name:
            return (width, c.hidden_size)
        return (c.hidden_size,)

    def _join_qkv(self, tensors: Sequence[Tensor]) -> Tensor:
        """HF: all query heads, all key heads, all values. Megatron: for each group its queries, its key, its value."""
        dim = self.config.kv_channels
        assert dim is not None
        groups, rest = tensors[1].size(0) // dim, tensors[0].shape[1:]
        return torch.cat([t.reshape(groups, -1, dim, *rest) for t in tensors], 1).reshape(-1, *rest)

    def _split_qkv(self, full: Tensor) -> Sequence[Tensor]:
        groups, dim = self.config.num_query_groups, self.config.kv_channels
        assert groups is not None and dim is not None
        rest = full.shape[1:]
        heads = full.reshape(groups, -1, dim, *rest)
        queries_of_group = heads.size(1) - 2
        return [part.reshape(-1, *rest) for part in heads.split([queries_of_group, 1, 1], 1)]


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _alone(full: Tensor) -> Sequence[Tensor]:
    return (full,)

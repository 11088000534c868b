"""The part of a Hugging Face tensor that one tensor-parallel rank of an SGLang server holds.

As SGLang's QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear, FusedMoE and VocabParallelEmbedding load
it, with attention, experts and vocabulary all cut over the same ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB_MULTIPLE = 64
"""SGLang pads the rows of embedding and head to it, with zeros; if these do not divide, to it times the ranks."""

_VOCABULARY = ("embed_tokens", "lm_head")
_ROWS = ("q_proj", "gate_proj", "up_proj")
_HEADS = ("k_proj", "v_proj")
_COLUMNS = ("o_proj", "down_proj")

# Server settings that cut some layers over other ranks than these.
_OTHER_LAYOUTS = {
    "ep_size": 1, "dp_size": 1, "attn_dp_size": 1, "attn_cp_size": 1, "moe_dp_size": 1, "moe_dense_tp_size": None,
    "enable_dp_attention": False, "enable_dp_lm_head": False, "ep_num_redundant_experts": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``ranks``. ``kv_heads``: key-value heads of the whole model; ranks beyond them hold copies."""

    rank: int
    ranks: int
    kv_heads: int

    def of(self, hf_name: str, tensor: Tensor) -> Tensor:
        """Its part of a whole tensor, a view where possible.

        Raises KeyError for a tensor of which it is not known how it is cut; see `uncut`.
        """
        module, kind = hf_name.split(".")[-2:]
        if module in _VOCABULARY:
            rows = _padded(len(tensor), VOCAB_MULTIPLE)
            if rows % self.ranks:
                rows = _padded(len(tensor), VOCAB_MULTIPLE * self.ranks)
            return torch.nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor))).chunk(self.ranks)[self.rank]
        if self.ranks == 1 or _is_whole(module, kind):
            return tensor
        if module in _HEADS:
            copies = max(1, self.ranks // self.kv_heads)
            return tensor.chunk(self.ranks // copies)[self.rank // copies]
        if module in _ROWS:
            return tensor.chunk(self.ranks)[self.rank]
        if module in _COLUMNS:
            return tensor.chunk(self.ranks, dim=1)[self.rank]
        raise KeyError(hf_name)


def uncut(hf_names: Iterable[str], server_info: Mapping[str, Any]) -> str | None:
    """Why the shards of a server of several ranks cannot be told; None if they can."""
    for setting, usual in _OTHER_LAYOUTS.items():
        if (value := server_info.get(setting, usual)) != usual:
            return f"does not know how servers with {setting} {value} cut their layers"
    known = _VOCABULARY + _ROWS + _HEADS + _COLUMNS
    for name in hf_names:
        module, kind = name.split(".")[-2:]
        if module not in known and not _is_whole(module, kind):
            return f"does not know how {name} is cut over the ranks of a server"
    return None


def _is_whole(module: str, kind: str) -> bool:
    """Norms and routers; also the bias that is added after a sum over the ranks."""
    return module.endswith("norm") or module == "gate" or (module in _COLUMNS and kind == "bias")


def _padded(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple

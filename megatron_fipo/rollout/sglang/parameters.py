"""SGLang's parameters, made of Hugging Face tensors: by them a server's weights are checked.

SGLang loads a tensor whose name it does not know without a word, and keeps the old values of one that never came. So
names are compared before anything is sent and, if asked for, the values afterwards.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_fipo.quantization.block_fp8 import dequantize
from megatron_fipo.quantization.formats import SCALE_SUFFIX
from megatron_fipo.rollout.sglang.shards import Shard

_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight(?:_scale_inv)?)")
# Made by the server itself: its own scales of weights that it quantises, and scales in the order that a kernel reads.
_DERIVED = re.compile(r".+weight_scale(_inv_.+)?")


def server_parameter(hf_name: str) -> tuple[str, tuple[int, int]]:
    """The SGLang parameter that holds a tensor, and the tensor's place in it (expert, part)."""
    if match := _EXPERT.fullmatch(hf_name):
        experts, number, part, kind = match[1], int(match[2]), match[3], match[4]
        if part == "down":
            return f"{experts}.w2_{kind}", (number, 0)
        return f"{experts}.w13_{kind}", (number, part == "up")
    *path, module, kind = hf_name.split(".")
    fused, part = _FUSED.get(module, (module, 0))
    return ".".join([*path, fused, kind]), (0, part)


def name_mismatch(hf_names: Iterable[str], server_names: Iterable[str]) -> str | None:
    """What is wrong if these tensors were sent to a server with these parameters; None if they are its whole model.

    A server reports block FP8 as one parameter, the scale being a part of the weight.
    """
    theirs = {name for name in server_names if not _DERIVED.fullmatch(name)}
    ours: dict[str, str] = {}
    for name in hf_names:
        parameter = server_parameter(name)[0]
        if parameter not in theirs and parameter.endswith(SCALE_SUFFIX):
            parameter = parameter.removesuffix(SCALE_SUFFIX)
        ours.setdefault(parameter, name)
    if unknown := [name for parameter, name in ours.items() if parameter not in theirs]:
        return f"the server's model has no place for {_some(unknown)}"
    if missing := sorted(theirs - ours.keys()):
        return f"the trainer's model has no {_some(missing)}, which the server's has"
    return None


class Checksums:
    """The checksums that servers report when they hold exactly the tensors that were added."""

    def __init__(self, hf_names: Iterable[str], sizes: Iterable[int] = (1,), kv_heads: int = 1) -> None:
        """``sizes``: how many ranks servers have; ``kv_heads``: key-value heads of the model."""
        self.values: dict[Shard, dict[str, str]] = {
            Shard(rank, size, kv_heads): {} for size in set(sizes) for rank in range(size)
        }
        self._parts: dict[str, dict[tuple[int, int], tuple[str, Tensor] | None]] = {}
        for name in hf_names:
            parameter, place = server_parameter(name)
            self._parts.setdefault(parameter, {})[place] = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor``; a parameter is hashed and forgotten as soon as it is whole, scales included."""
        parameter, place = server_parameter(name)
        self._parts[parameter][place] = name, tensor.clone()
        weight = parameter.removesuffix(SCALE_SUFFIX)
        needed = [key for key in (weight, weight + SCALE_SUFFIX) if key in self._parts]
        if any(part is None for key in needed for part in self._parts[key].values()):
            return
        wholes = [[part for _, part in sorted(self._parts.pop(key).items()) if part is not None] for key in needed]
        for shard, values in self.values.items():
            parts = zip(*([shard.of(name, tensor) for name, tensor in whole] for whole in wholes), strict=True)
            values[weight] = _checksum(torch.cat([_value(*part) for part in parts]))

    @classmethod
    def joined(cls, parts: Iterable["Checksums"]) -> "Checksums":
        """Those of all the tensors that were added to any of them."""
        whole = cls(())
        whole.values = {}
        for part in parts:
            for shard, values in part.values.items():
                whole.values[shard] = whole.values.get(shard, {}) | values
        return whole

    def mismatch(self, reported: Sequence[Mapping[str, str]]) -> str | None:
        """What differs in the reports of a server's ranks; None if nothing does."""
        shards = [shard for shard in self.values if shard.ranks == len(reported)]
        if not shards:
            return f"{len(reported)} ranks report checksums, of another number than the server had"
        for shard in shards:
            values, report = self.values[shard], reported[shard.rank]
            if wrong := sorted(name for name, value in values.items() if report.get(name) != value):
                where = f" on rank {shard.rank}" if shard.ranks > 1 else ""
                return f"{_some(wrong)} of {len(values)} parameters differ from the trainer's{where}"
        return None


def _value(weight: Tensor, scale_inv: Tensor | None = None) -> Tensor:
    """What the server hashes: of a quantised weight what it stands for."""
    return weight if scale_inv is None else dequantize(weight, scale_inv, torch.bfloat16)


def _checksum(tensor: Tensor) -> str:
    """As SGLang computes it, for a tensor on the same kind of device as the server's."""
    if tensor.is_cuda:
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

        return f"{gpu_tensor_hash(tensor):016x}"
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()[:16]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

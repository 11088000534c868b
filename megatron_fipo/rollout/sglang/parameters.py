"""SGLang's parameters, made of Hugging Face tensors: by them a server's weights are checked.

SGLang loads a tensor whose name it does not know without a word, and keeps the old values of one that never came. So
names are compared before anything is sent and, if asked for, the values afterwards.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_fipo.quantization.block_fp8 import dequantize
from megatron_fipo.quantization.formats import SCALE_SUFFIX

VOCAB_MULTIPLE = 64  # SGLang pads the rows of embedding and head to it, with zeros

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
    """The checksums that a server of one rank reports when it holds exactly the tensors that were added."""

    def __init__(self, hf_names: Iterable[str]) -> None:
        self.values: dict[str, str] = {}
        self._parts: dict[str, dict[tuple[int, int], Tensor | None]] = {}
        for name in hf_names:
            parameter, place = server_parameter(name)
            self._parts.setdefault(parameter, {})[place] = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor``; a parameter is hashed and forgotten as soon as it is whole, scales included."""
        parameter, place = server_parameter(name)
        self._parts[parameter][place] = tensor.clone()
        weight = parameter.removesuffix(SCALE_SUFFIX)
        needed = [key for key in (weight, weight + SCALE_SUFFIX) if key in self._parts]
        if any(part is None for key in needed for part in self._parts[key].values()):
            return
        value, *scale = (_assemble(key, self._parts.pop(key)) for key in needed)
        if scale:  # the server hashes what the two stand for
            value = dequantize(value, scale[0], torch.bfloat16)
        self.values[weight] = _checksum(value)

    def mismatch(self, reported: Mapping[str, str]) -> str | None:
        """What differs in a server's report; None if nothing does."""
        wrong = sorted(name for name, value in self.values.items() if reported.get(name) != value)
        return f"{_some(wrong)} of {len(self.values)} parameters differ from the trainer's" if wrong else None


def _assemble(parameter: str, parts: Mapping[tuple[int, int], Tensor | None]) -> Tensor:
    whole = torch.cat([part for _, part in sorted(parts.items()) if part is not None])
    if parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = torch.nn.functional.pad(whole, (0, 0, 0, -whole.shape[0] % VOCAB_MULTIPLE))
    return whole


def _checksum(tensor: Tensor) -> str:
    """As SGLang computes it, for a tensor on the same kind of device as the server's."""
    if tensor.is_cuda:
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

        return f"{gpu_tensor_hash(tensor):016x}"
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()[:16]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

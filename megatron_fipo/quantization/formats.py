"""Formats in which a rollout engine takes weights, as a checkpoint's config.json declares them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.quantization.block_fp8 import BLOCK, E4M3, MX_BLOCK, block_fp8, mxfp8
from megatron_fipo.quantization.layers import LINEAR_WEIGHT

Scheme = Literal["none", "block", "mxfp8", "channel", "tensor", "custom"]
SCALE_SUFFIX = "_scale_inv"  # added to the name of the weight


@dataclass(frozen=True)
class WeightFormat:
    """In what numbers linear layers hold their weights; all other tensors stay as the trainer has them.

    ``scheme``: "none", the trainer's dtype; "block", E4M3 with an fp32 scale per 128 x 128; "mxfp8", E4M3 with a power
    of two per 1 x 32; "channel", with a scale per row, made by the engine itself of what the trainer holds; a trainer's
    recipe alone may be "tensor", a scale per weight, or "custom".
    ``power_of_two``: of the scales of "block".
    ``not_converted``: modules that stay as they are, matched as a run of whole dotted components ("model.layers.0").
    """

    scheme: Scheme = "none"
    power_of_two: bool = False
    not_converted: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> "WeightFormat":
        """The format that a model's config.json declares. Raises UserError for one that cannot be sent."""
        declared = config.get("quantization_config")
        if declared is None:
            return cls()
        method = str(declared.get("quant_method") if isinstance(declared, dict) else declared)
        if method not in ("fp8", "mxfp8"):
            raise UserError(f"{where} is quantised by {method!r}, {_CANNOT_BE_UPDATED.get(method, _UNKNOWN)}; {_FIX}")
        block = declared.get("weight_block_size")
        if method == "fp8" and block is None:
            raise UserError(f"{where} has FP8 weights with one scale per tensor, {_PER_TENSOR}; {_FIX}")
        if block not in ([[BLOCK, BLOCK]] if method == "fp8" else [[1, MX_BLOCK], None]):
            raise UserError(f"{where} has {method} blocks of {block}, {_UNKNOWN}; {_FIX}")
        if declared.get("activation_scheme", "dynamic") != "dynamic":
            raise UserError(f"{where} has fixed activation scales, which go stale as the policy moves; {_FIX}")
        skipped = tuple(declared.get("modules_to_not_convert") or declared.get("ignored_layers") or ())
        if method == "mxfp8":
            return cls("mxfp8", not_converted=skipped)
        return cls("block", declared.get("scale_fmt") == "ue8m0", skipped)

    def config_entry(self) -> dict[str, Any]:
        """The quantization_config that declares this format; "ue8m0" lets engines round activations' scales alike."""
        entry: dict[str, Any] = {"quant_method": "fp8" if self.scheme == "block" else "mxfp8", "fmt": "e4m3"}
        entry |= {"activation_scheme": "dynamic", "modules_to_not_convert": list(self.not_converted)}
        entry["weight_block_size"] = [BLOCK, BLOCK] if self.scheme == "block" else [1, MX_BLOCK]
        return entry | ({"scale_fmt": "ue8m0"} if self.power_of_two or self.scheme == "mxfp8" else {})

    def quantizes(self, name: str) -> bool:
        """Whether the tensor is computed with in FP8."""
        linear = LINEAR_WEIGHT.fullmatch(name)
        return self.scheme != "none" and linear is not None and not self._skips(linear["module"])

    def _skips(self, module: str) -> bool:
        """As SGLang matches: with or without the leading "model.", and all experts of a layer if any one is named."""
        experts = module.partition(".experts.")[0] + ".experts" if ".experts." in module else None
        for entry in self.not_converted:
            skipped = entry.rstrip(".").removeprefix("model.")
            if f".{skipped}." in f".{experts or module}." or (experts and experts in f"model.{skipped}"):
                return True
        return False

    @property
    def is_sent(self) -> bool:
        """Whether the trainer makes the FP8 numbers."""
        return self.scheme in ("block", "mxfp8")

    def layout(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Any, torch.dtype]]:
        """Name, shape and dtype of each tensor that :meth:`tensors` makes of one of the trainer's."""
        if not (self.is_sent and self.quantizes(name)):
            return [(name, shape, dtype)]
        rows, columns = shape
        if self.scheme == "block":
            scale: Any = ((-(-rows // BLOCK), -(-columns // BLOCK)), torch.float32)
        else:
            scale = ((rows, columns // MX_BLOCK), torch.uint8)
        return [(name, shape, E4M3), (name + SCALE_SUFFIX, *scale)]

    def tensors(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """One of the trainer's tensors as the engine takes it, scales behind their weight. Raises UserError."""
        if not (self.is_sent and self.quantizes(name)):
            return [(name, tensor)]
        if self.scheme == "block":
            quantised, scale = block_fp8(tensor, power_of_two=self.power_of_two, name=name)
        else:
            quantised, scale = mxfp8(tensor, name=name)
        return [(name, quantised), (name + SCALE_SUFFIX, scale)]

    def convert(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A stream of the trainer's tensors as the engine takes them. Raises UserError naming a tensor with NaNs."""
        for name, tensor in stream:
            yield from self.tensors(name, tensor)

    def precision(self, name: str) -> str:
        """Of one weight, in words."""
        if not self.quantizes(name):
            return "not quantised"
        if self.scheme == "block":
            return f"FP8 in blocks with {'power-of-two' if self.power_of_two else 'fp32'} scales"
        return {"mxfp8": "MXFP8", "custom": "FP8 of a custom recipe"}.get(
            self.scheme, f"FP8 with a scale per {self.scheme}"
        )


_PER_TENSOR = "which SGLang transposes when it loads them, so that they cannot be updated while it runs"
_CANNOT_BE_UPDATED = {"modelopt": _PER_TENSOR, "modelopt_fp8": _PER_TENSOR}
_UNKNOWN = "which the trainer cannot make"
_FIX = "give a folder that tools/make_fp8_checkpoint.py wrote, or an unquantised model"

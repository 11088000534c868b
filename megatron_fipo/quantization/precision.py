"""Which weights the trainer computes with in FP8, which the rollout engine, and where the two differ."""

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fipo.quantization.block_fp8 import BLOCK
from megatron_fipo.quantization.formats import Scheme, WeightFormat
from megatron_fipo.quantization.layers import linear_weights

_RECIPES: dict[str, Scheme] = {"blockwise": "block", "mxfp8": "mxfp8", "custom": "custom"}


def trainer_format(args: argparse.Namespace) -> WeightFormat:
    """What Megatron's FP8 arguments make of the weights in the forward pass.

    TransformerEngine quantises every linear layer, except those of the first and last layers that
    --first-last-layers-bf16 leaves out; it rounds the scales of blocks to powers of two unless the environment has
    NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1.
    """
    if not args.fp8:
        return WeightFormat()
    kept: Iterable[int] = ()
    if args.first_last_layers_bf16:
        start, end = args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
        kept = (layer for layer in range(args.num_layers) if layer < start or layer >= args.num_layers - end)
    return WeightFormat(
        _RECIPES.get(args.fp8_recipe, "tensor"),
        power_of_two=os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1",
        not_converted=tuple(f"model.layers.{layer}" for layer in kept),
    )


@dataclass(frozen=True)
class PrecisionReport:
    """``weights``: the model's linear weights, [out, in] each; nothing else is ever quantised."""

    trainer: WeightFormat
    rollout: WeightFormat
    weights: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, trainer: WeightFormat, rollout: WeightFormat, architecture: Mapping[str, Any]) -> "PrecisionReport":
        """For the model that Megatron's arguments describe (`model.hf_config.architecture`)."""
        return cls(trainer, rollout, linear_weights(architecture))

    @property
    def differing(self) -> list[str]:
        """Weights in other numbers here than there."""
        return [name for name in self.weights if self.trainer.precision(name) != self.rollout.precision(name)]

    @property
    def difference(self) -> str | None:
        """The same as a sentence; None if there is none."""
        if not (names := self.differing):
            return None
        pairs: dict[tuple[str, str], str] = {}
        for name in names:
            pairs.setdefault((self.trainer.precision(name), self.rollout.precision(name)), name)
        examples = "; ".join(f"{name}: {ours} here, {theirs} there" for (ours, theirs), name in pairs.items())
        return f"{len(names)} of {len(self.weights)} linear weights differ between trainer and engine ({examples})"

    def summary(self) -> dict[str, Any]:
        """For --dry-run."""
        return {
            "linear_weights": len(self.weights),
            "trainer_fp8": sum(map(self.trainer.quantizes, self.weights)),
            "rollout_fp8": sum(map(self.rollout.quantizes, self.weights)),
            "differing": len(self.differing),
            "difference": self.difference,
        }


def cut_elsewhere(architecture: Mapping[str, Any], tensor_parallel: int) -> list[str]:
    """Kinds of linear layers whose 128 x 128 blocks lie elsewhere in the trainer than in the weights' HF form.

    The trainer quantises its own shard of the fused weights, in which the rows of each query group (query heads, key,
    value) and of gate and up follow each other. Both see the same numbers only where every part begins on a block.
    """
    head, heads, ffn = (architecture[key] for key in ("kv_channels", "num_attention_heads", "ffn_hidden_size"))
    sizes = {"q, k and v": head, "o": heads * head // tensor_parallel, "gate, up and down": ffn // tensor_parallel}
    if architecture.get("num_experts"):
        sizes["experts"] = architecture["moe_ffn_hidden_size"]
    return [kind for kind, size in sizes.items() if size % BLOCK]

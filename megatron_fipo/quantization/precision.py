"""Which weights the trainer computes with in FP8, which the rollout engine, and where the two differ."""

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
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
    """Of the model that ``architecture`` describes (Megatron's arguments, `model.hf_config.architecture`).

    ``tensor_parallel``: ranks over which the trainer cuts weights.
    """

    trainer: WeightFormat
    rollout: WeightFormat
    architecture: Mapping[str, Any]
    tensor_parallel: int = 1

    @cached_property
    def weights(self) -> list[str]:
        """Of its linear layers; nothing else is ever quantised."""
        return list(linear_weights(self.architecture))

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
            "blocks_cut_elsewhere": self.blocks_cut_elsewhere,
        }

    @property
    def blocks_cut_elsewhere(self) -> list[str]:
        """Kinds of linear layers whose 128 x 128 blocks lie elsewhere in the trainer than in the engine.

        The trainer quantises its shard of fused weights, in which the rows of each query group (its queries, key and
        value) and of gate and up follow each other. Both have the same numbers only where every part begins on a block.
        """
        if {self.trainer.scheme, self.rollout.scheme} != {"block"}:
            return []
        model, ranks = self.architecture, self.tensor_parallel
        head, ffn = model["kv_channels"], model["ffn_hidden_size"] // ranks
        sizes = {"q, k, v": head, "o": model["num_attention_heads"] * head // ranks, "gate, up, down": ffn}
        if ranks == 1:  # it begins on a block
            del sizes["o"]
        if model.get("num_experts"):
            sizes["experts"] = model["moe_ffn_hidden_size"]
        return [kind for kind, size in sizes.items() if size % BLOCK]

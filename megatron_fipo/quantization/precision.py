"""Which weights the trainer computes with in FP8, which the rollout engine, and where the two differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_fipo.quantization.block_fp8 import BLOCK
from megatron_fipo.quantization.formats import Scheme, WeightFormat
from megatron_fipo.quantization.layers import linear_weights

_RECIPES: dict[str, Scheme] = {"blockwise": "block", "mxfp8": "mxfp8", "custom": "custom"}


def trainer_format(recipe: str, power_of_two: bool, bf16_layers: Iterable[int]) -> WeightFormat:
    """What an FP8 recipe makes of the weights in the trainer's forward pass.

    TransformerEngine quantises every linear layer, those of ``bf16_layers`` excepted; embedding, head, norms and router
    never.

    Args:
        recipe: Megatron's --fp8-recipe.
        power_of_two: whether the scales of blocks are.
    """
    kept = tuple(f"model.layers.{layer}" for layer in bf16_layers)
    return WeightFormat(_RECIPES.get(recipe, "tensor"), power_of_two, kept)


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

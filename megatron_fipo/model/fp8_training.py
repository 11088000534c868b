"""FP8 training with TransformerEngine: its flags, what they mean, and what they ask of shapes.

Only the linear layers of the decoder's blocks compute in FP8. Embedding, norms, attention, the experts' router, the
output layer with its log-probs, the loss and the weights that the optimizer updates stay in higher precision.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any

from megatron_fipo.errors import UserError

FP8_PRESETS: dict[str, dict[str, Any]] = {
    "hopper": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "blackwell": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
"""Megatron's arguments by what people train on each GPU: small blocks, each with a scale of its own, so that an outlier
spoils its block alone; four exponent bits for gradients as well."""

BACKWARD = {"native": None, "high-precision": "high_precision", "dequantized": "dequantized"}
"""--fp8-backward -> TransformerEngine's `Recipe.backward_override`."""

GATHER_BLOCK = 128  # rows of a shard that block scaling gathers over tensor-parallel ranks in FP8, else in BF16


@dataclass(frozen=True)
class Fp8Settings:
    """How a model trains in FP8.

    format: "e4m3", or "hybrid" (e5m2 gradients)
    recipe: "tensorwise", "blockwise", "mxfp8" or "custom", see --fp8-recipe
    backward: one of BACKWARD
    power_of_two_scales: whether scales are powers of two; weights that an engine quantises as well must agree
    bf16_layers: numbers, from 0, of the layers that compute in BF16
    """

    format: str
    recipe: str
    backward: str
    power_of_two_scales: bool
    bf16_layers: tuple[int, ...]


def add_precision_flags(group: argparse._ArgumentGroup) -> None:
    """Flags beside Megatron's --fp8-format, --fp8-recipe, --fp8-quantizer-factory and --first-last-layers-bf16."""
    group.add_argument(
        "--fp8-preset",
        choices=sorted(FP8_PRESETS),
        help="linear layers in FP8 as the GPU wants it: e4m3 in blocks of 128 (hopper), MXFP8 (blackwell); docs/fp8.md",
    )
    group.add_argument(
        "--fp8-backward",
        choices=list(BACKWARD),
        default="native",
        help="gradients in FP8, or in BF16 from the original or the dequantized operands of the FP8 forward pass",
    )


def fp8_settings(args: argparse.Namespace) -> Fp8Settings | None:
    """The FP8 settings; None: no FP8."""
    if not args.fp8:
        return None
    bf16_layers: set[int] = set()
    if args.first_last_layers_bf16 and args.num_layers:
        bf16_layers.update(range(args.num_layers_at_start_in_bf16))
        bf16_layers.update(range(args.num_layers - args.num_layers_at_end_in_bf16, args.num_layers))
    return Fp8Settings(
        format=args.fp8,
        recipe=args.fp8_recipe,
        backward=args.fp8_backward,
        power_of_two_scales=args.fp8_recipe == "mxfp8"
        or (args.fp8_recipe == "blockwise" and os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1"),
        bf16_layers=tuple(sorted(bf16_layers)),
    )


def row_multiple(recipe: str) -> int:
    """What the rows and columns of an FP8 matrix are multiples of: cuBLAS reads 16 bytes, MXFP8 has blocks of 32."""
    return 32 if recipe == "mxfp8" else 16


def check_fp8(args: argparse.Namespace) -> None:
    """Check parsed arguments. Raises UserError naming the flag, the value seen and the fix."""
    if not args.fp8:
        for flag in (word.split("=")[0] for word in args.command_line):
            if flag.startswith("--fp8-") or flag == "--first-last-layers-bf16":
                raise UserError(f"{flag} does nothing without FP8: add --fp8-preset or --fp8-format, or leave it out")
        return
    if args.fp8_recipe == "delayed":
        raise UserError(
            "--fp8-recipe delayed scales by the values of earlier passes, so old and new log-probs would differ and no "
            "ratio be 1 in a rollout's first update; use --fp8-preset hopper or blackwell"
        )
    if not args.bf16:
        raise UserError("FP8 layers compute from and to BF16: add --bf16")
    if args.fp8_recipe == "custom" and not args.fp8_quantizer_factory:
        raise UserError("--fp8-recipe custom needs --fp8-quantizer-factory MODULE.FUNCTION")
    if "NVTE_BACKWARD_OVERRIDE" in os.environ:
        raise UserError(
            "NVTE_BACKWARD_OVERRIDE is set: unset it and use --fp8-backward, which is written down with the run"
        )
    _check_features(args)


def _check_features(args: argparse.Namespace) -> None:
    """Each tensor-parallel rank's matrices have to be multiples of `row_multiple` in both directions."""
    if args.hidden_size is None:
        return
    multiple = row_multiple(args.fp8_recipe)
    tensor = args.tensor_model_parallel_size
    wrong = _misfits(args, tensor, multiple)
    if not wrong:
        return
    fits = [t for t in range(1, tensor) if tensor % t == 0 and not _misfits(args, t, multiple)]
    layer, size = wrong[0]
    fix = f"use --tensor-model-parallel-size {max(fits)}" if fits else "train this model without FP8"
    raise UserError(
        f"--fp8-recipe {args.fp8_recipe} needs multiples of {multiple}, but {layer} is {size} wide on each of "
        f"{tensor} tensor-parallel ranks; {fix}"
    )


def _misfits(args: argparse.Namespace, tensor: int, multiple: int) -> list[tuple[str, int]]:
    head, heads = args.kv_channels, args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    widths = {
        "the hidden state": args.hidden_size,
        "self_attention.linear_qkv": (heads // tensor + 2 * max(groups // tensor, 1)) * head,
        "self_attention.linear_proj": heads // tensor * head,
    }
    dense = not args.num_experts or (isinstance(args.moe_layer_freq, list) and 0 in args.moe_layer_freq)
    if dense:
        widths["mlp.linear_fc2"] = args.ffn_hidden_size // tensor
    if args.num_experts:
        widths["mlp.experts.linear_fc2"] = args.moe_ffn_hidden_size // (args.expert_tensor_parallel_size or tensor)
    return [(layer, width) for layer, width in widths.items() if width % multiple]

"""Quantise a Hugging Face folder to FP8, as SGLang serves it and as the trainer's weight updates have it afterwards.

    python tools/make_fp8_checkpoint.py --hf DIR --out DIR
    torchrun ... -m megatron_fipo.train --hf-model DIR --rollout-engine sglang --sglang-model-path OUT ...

Linear layers become E4M3 with their scales behind them (`NAME.weight`, `NAME.weight_scale_inv`); embedding, head, norms
and the router of experts stay bf16. The numbers come from the function that the weight updates use. Tensors are read
and written one by one. OUT appears whole or not at all.

Exit code: 0, or 2 for a mistake that the user can mend, told in one line on stderr. docs/fp8_rollouts.md says more.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_fipo import compat

compat.install()  # before anything of Megatron is used

from megatron_fipo.checkpoint.hf_files import HFTensor, HFWeights  # noqa: E402
from megatron_fipo.checkpoint.hf_write import read_ahead, write_hf_folder  # noqa: E402
from megatron_fipo.checkpoint.torch_dist import weight_map_of_config  # noqa: E402
from megatron_fipo.errors import UserError  # noqa: E402
from megatron_fipo.model.hf_config import architecture, read_hf_config  # noqa: E402
from megatron_fipo.quantization.formats import WeightFormat  # noqa: E402
from megatron_fipo.quantization.layers import LINEAR_WEIGHT  # noqa: E402
from megatron_fipo.rollout.sglang.served import ServedModel, server_fields  # noqa: E402


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="unquantised Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--format",
        choices=["block", "mxfp8"],
        default="block",
        help="block: a scale per 128 x 128 (Hopper, and Blackwell without DeepGEMM); mxfp8: per 1 x 32 (Blackwell)",
    )
    parser.add_argument(
        "--fp32-scales",
        action="store_true",
        help="do not round scales of blocks to powers of two; as NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 in the trainer",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules that stay bf16, e.g. model.layers.0, as the trainer's --first-last-layers-bf16",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was done here")
    return parser.parse_args(argv)


def make(hf_dir: Path, out: Path, scheme: Any, *, power_of_two: bool, skip: Sequence[str]) -> dict[str, Any]:
    """Write the FP8 folder. Raises UserError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists: give a new folder")
    config = read_hf_config(hf_dir)
    if "quantization_config" in config:
        raise UserError(f"{hf_dir} is quantised already (quantization_config in config.json): give the original model")
    weights, weight_map = HFWeights(hf_dir), weight_map_of_config(hf_dir)
    weights.check(weight_map)
    names = list(weight_map.hf_names())
    # What the engine never quantises; named for other readers of the folder.
    never = [name.removesuffix(".weight") for name in names if name.endswith((".mlp.gate.weight", "lm_head.weight"))]
    weight_format = WeightFormat(scheme, power_of_two, (*dict.fromkeys((*never, *skip)),))
    for module in skip:
        if all(map(WeightFormat(scheme, not_converted=(module,)).quantizes, filter(LINEAR_WEIGHT.fullmatch, names))):
            raise UserError(f"--skip {module} names no linear layer of {hf_dir}; give e.g. model.layers.0")
    served = ServedModel(str(hf_dir), config["model_type"], architecture(hf_dir), weight_format)
    if fault := served.fault(server_fields(("--moe-runner-backend", "cutlass")), None):
        raise UserError(f"no server can hold this model in FP8: {fault}")

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, weights[name].bfloat16()

    layout = [
        HFTensor(*entry) for name in names for entry in weight_format.layout(name, weights.shape(name), torch.bfloat16)
    ]
    write_hf_folder(
        weight_format.convert(read_ahead(stream())), layout, hf_dir, out, torch.bfloat16, weight_format.config_entry()
    )
    return {
        "out": str(out),
        "tensors": len(names),
        "quantised": sum(map(weight_format.quantizes, names)),
        "bytes": sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in layout),
        "quantization_config": weight_format.config_entry(),
    }


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    warnings.simplefilter("ignore")  # Megatron's, of its own configuration
    try:
        result = make(args.hf, args.out, args.format, power_of_two=not args.fp32_scales, skip=args.skip)
    except UserError as error:
        print(f"make_fp8_checkpoint: {error}", file=sys.stderr)
        return 2
    print(
        f"{result['quantised']} of {result['tensors']} tensors quantised, {result['bytes']:,} bytes in {result['out']}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

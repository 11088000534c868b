"""Quantise a Hugging Face checkpoint after training with ModelOpt, for SGLang to serve.

    .venv-modelopt/bin/python tools/quantize_checkpoint.py --hf DIR --prompts FILE --out DIR --format fp8

Needs the packages of `make modelopt`. `fp8`: E4M3 weights and activations, one scale per tensor (Hopper and later);
`nvfp4`: FP4 weights and activations, one scale per 16 values (Blackwell). Embeddings, norms, routers and the output
layer stay in bf16. Activation scales come from running the prompts - any file that --prompt-data takes - through the
model. OUT appears whole or not at all; `sglang.launch_server --model-path OUT` finds the format by itself.

This is for a model that no longer changes: activation scales are fixed here, and SGLang takes no weight updates for
these formats. Exit code: 0; 2 for a mistake that the user can mend, told in one line on stderr.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from megatron_fipo.checkpoint.side_files import copy_side_files
from megatron_fipo.data.encoding import encoder, load_tokenizer
from megatron_fipo.data.layouts import Keys
from megatron_fipo.data.prompts import drop_long, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.model.hf_config import weight_files

FORMATS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}  # ModelOpt's names
COMPARED_PROMPTS = 32


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="PATH", help="what --prompt-data takes")
    parser.add_argument("--prompt-key", metavar="COLUMN", help="of the prompt; default: as in training")
    parser.add_argument("--apply-chat-template", action=argparse.BooleanOptionalAction, help="default: as in training")
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="prompts to calibrate on (default: 512)")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048, metavar="N", help="longer ones are left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    return parser.parse_args(argv)


def calibration_prompts(ours: argparse.Namespace) -> list[Tensor]:
    """Token ids [1, length] of the first `--samples` prompts. Raises UserError as the trainer's reader does."""
    if ours.samples < 1:
        raise UserError(f"--samples {ours.samples}: calibrate on at least one prompt")
    encode = encoder(load_tokenizer(str(ours.hf)), ours.apply_chat_template)
    prompts = drop_long(read_prompts(ours.prompts, encode, Keys(prompt=ours.prompt_key)), ours.max_prompt_tokens)
    return [torch.tensor([prompt.tokens]) for prompt in prompts[: ours.samples]]


def quantize(ours: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, quantise, write OUT; what --json holds."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [tokens.to(device) for tokens in calibration_prompts(ours)]
    compared = [tokens for tokens in prompts if tokens.size(1) > 1][:COMPARED_PROMPTS]
    model = load_model(ours.hf).to(device)
    with torch.inference_mode():
        before = [log_probs(model, tokens) for tokens in compared]

        def run_prompts(model: torch.nn.Module) -> None:
            for tokens in prompts:  # one at a time: padding would enter the activations' ranges
                model(tokens, use_cache=False)

        model = mtq.quantize(model, getattr(mtq, FORMATS[ours.format]), run_prompts)
        gap = None
        if device == "cuda" or ours.format != "nvfp4":  # ModelOpt emulates FP4 activations on GPUs only
            pairs = zip(compared, before, strict=True)
            gap = torch.cat([log_probs(model, tokens) - old for tokens, old in pairs]).abs()
        ours.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{ours.out.name}.", dir=ours.out.parent) as scratch:
            partial = Path(scratch) / "partial"
            copy_side_files(ours.hf, partial)
            export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=partial)
            result = describe(partial)
            partial.rename(ours.out)
    return result | {
        "format": ours.format,
        "bytes_before": sum(file.stat().st_size for file in weight_files(ours.hf)),
        "calibration_prompts": len(prompts),
        "calibration_tokens": sum(tokens.numel() for tokens in prompts),
        "logp_difference_mean": None if gap is None else gap.mean().item(),
        "logp_difference_max": None if gap is None else gap.max().item(),
        "out": str(ours.out),
    }


def load_model(hf_dir: Path) -> Any:
    """The transformers model in bf16. Raises UserError: weights are missing, misshapen or not finite."""
    model, found = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
    )
    if missing := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise UserError(
            f"--hf {hf_dir} lacks {missing[0]} in the shape that its config.json asks for: download it again"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--hf {hf_dir} has NaN or infinite values in {name}: take another copy of the model")
    return model.eval()


def log_probs(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of each token of a prompt but the first, fp32."""
    logits = model(tokens, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def describe(folder: Path) -> dict[str, Any]:
    """What was written: bytes, and how many weights are quantised and how many are not."""
    dtypes = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    weights = [name for name in dtypes if name.endswith("weight")]
    quantized = [name for name in weights if dtypes[name] in ("F8_E4M3", "U8")]
    return {
        "bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "quantized": len(quantized),
        "unquantized": len(weights) - len(quantized),
    }


def check(ours: argparse.Namespace) -> None:
    if importlib.util.find_spec("modelopt") is None:
        raise UserError(
            "modelopt is not installed: run 'make modelopt' and start this tool with .venv-modelopt/bin/python"
        )
    if ours.out.exists() and (not ours.out.is_dir() or any(ours.out.iterdir())):
        raise UserError(f"--out {ours.out} exists: give a new folder")
    if not (ours.hf / "config.json").is_file():
        raise UserError(f"--hf {ours.hf} has no config.json: give a Hugging Face model folder")
    config = json.loads((ours.hf / "config.json").read_text())
    if "quantization_config" in config:
        raise UserError(f"--hf {ours.hf} is quantised already: give the model that it was made from")
    weight_files(ours.hf)


def main(argv: Sequence[str]) -> int:
    ours = parse(argv)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    try:
        check(ours)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # ModelOpt prints every quantiser
            result = quantize(ours)
    except UserError as error:
        print(f"quantize_checkpoint: {error}", file=sys.stderr)
        return 2
    print(
        f"{result['quantized']} weights in {ours.format}, {result['unquantized']} in bf16; "
        f"{result['bytes'] / 1e6:.1f} MB of {result['bytes_before'] / 1e6:.1f} MB"
    )
    if result["logp_difference_mean"] is not None:
        print(
            f"log-probs of the prompts differ by {result['logp_difference_mean']:.4f} on average, "
            f"by at most {result['logp_difference_max']:.4f}"
        )
    print(f"written to {result['out']}")
    if ours.json:
        ours.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

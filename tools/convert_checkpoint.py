"""Convert between Hugging Face folders and Megatron's torch_dist checkpoints, and check a conversion.

    python tools/convert_checkpoint.py import --hf DIR --out DIR
    python tools/convert_checkpoint.py export --megatron DIR --out DIR
    python tools/convert_checkpoint.py verify --hf DIR --megatron DIR
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py import --hf DIR --out DIR --tensor-model-parallel-size 8

`import` writes what `megatron_fipo.train --load DIR --finetune` and Megatron-LM itself load, in any layout, and keeps
configuration, tokenizer and chat template in DIR/hf. `export` reads a checkpoint of any layout, tensor by tensor.
`verify` runs both models over the same tokens and compares logits. OUT appears whole or not at all.
`--bridge megatron-bridge` does both for architectures that we do not train, and holds the model in memory.

Further flags are Megatron's, those of its layout above all. Exit code: 0; 1 if `verify` finds a difference; 2 for a
mistake that the user can mend, told in one line on stderr. docs/conversion.md says more.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fipo import compat

compat.install()  # before anything of Megatron is used

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.training import checkpointing, training  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar, set_verbosity_error  # noqa: E402

from megatron_fipo.arguments import build_parser, platform_defaults, validate_megatron  # noqa: E402
from megatron_fipo.checkpoint.bridge import Bridge  # noqa: E402
from megatron_fipo.checkpoint.hf_files import HFWeights  # noqa: E402
from megatron_fipo.checkpoint.hf_map import EMBEDDING  # noqa: E402
from megatron_fipo.checkpoint.hf_write import read_ahead, write_hf_folder  # noqa: E402
from megatron_fipo.checkpoint.parity import Parity, compare  # noqa: E402
from megatron_fipo.checkpoint.side_files import copy_side_files  # noqa: E402
from megatron_fipo.checkpoint.torch_dist import TorchDistWeights, checkpoint_folder, read_metadata  # noqa: E402
from megatron_fipo.checkpoint.torch_dist_write import save_torch_dist  # noqa: E402
from megatron_fipo.errors import UserError  # noqa: E402
from megatron_fipo.model.build import model_provider  # noqa: E402
from megatron_fipo.model.hf_config import architecture, megatron_arguments  # noqa: E402
from megatron_fipo.session import as_one_rank, initialize  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDE_FILES = "hf"  # folder in an imported checkpoint
PROMPTS, PROMPT_TOKENS = 4, 32  # of the built-in prompts: random tokens, since they need no tokenizer and no language


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export,verify}")
    for name in ("import", "export", "verify"):
        command = commands.add_parser(name, allow_abbrev=False)
        needs_hf = name != "export"
        source = "Hugging Face folder" if needs_hf else "folder with config and tokenizer (default: MEGATRON/hf)"
        command.add_argument("--hf", type=Path, required=needs_hf, metavar="DIR", help=source)
        if name != "import":
            command.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
        if name != "verify":
            command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
            command.add_argument("--bridge", choices=["megatron-bridge"], help="for any architecture (make bridge)")
        else:
            command.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: random)")
        command.add_argument("--dtype", choices=DTYPES, help="default: the source's own")
        command.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    return parser.parse_known_args(argv)


def build_model(
    hf_dir: Path, dtype: torch.dtype, flags: Sequence[str], bridge: Bridge | None = None
) -> tuple[argparse.Namespace, list[Any]]:
    """Start Megatron in the layout of `flags`; its arguments and this rank's chunks with random weights."""
    as_one_rank()
    parser = build_parser()
    parser.set_defaults(**platform_defaults() | (bridge.arguments() if bridge else architecture(hf_dir)))
    parser.set_defaults(bf16=dtype is torch.bfloat16, no_save_optim=True, no_save_rng=True, finetune=True)
    parser.set_defaults(seq_length=PROMPT_TOKENS, train_iters=1, lr=1e-6, min_lr=0.0, use_distributed_optimizer=False)
    parser.set_defaults(perform_initialization=False)  # every weight is loaded
    args = parser.parse_args(list(flags))
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    validate_megatron(args)
    initialize(args)
    provider = bridge.model_provider(args) if bridge else model_provider(args)
    return args, training.get_model(provider, wrap_with_ddp=False)


def own_dtype(hf_dir: Path) -> torch.dtype:
    """What holds every tensor of the folder exactly."""
    weights = HFWeights(hf_dir)
    return torch.bfloat16 if {weights.dtype(n) for n in weights.names()} == {torch.bfloat16} else torch.float32


def import_hf(
    hf_dir: Path, out: Path, dtype: torch.dtype | None, flags: Sequence[str], *, with_bridge: bool = False
) -> dict[str, Any]:
    """Hugging Face -> torch_dist. Collective over the ranks of the launch."""
    check_new(out)
    bridge = Bridge(hf_dir) if with_bridge else None
    if not bridge:
        megatron_arguments(hf_dir)  # names what the folder lacks
    stored = dtype or own_dtype(hf_dir)
    args, chunks = build_model(hf_dir, stored, flags, bridge)
    if bridge:
        bridge.load_hf_weights(chunks, hf_dir)
    partial = out.with_name(out.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        copy_side_files(hf_dir, partial / SIDE_FILES, dtype)
    dist.barrier()
    args.save = str(partial)
    if bridge:
        checkpointing.save_checkpoint(0, chunks, None, None, 0, release=True)
    else:
        keep_freed_memory()
        save_torch_dist(chunks, hf_dir, partial)
    if dist.get_rank() == 0:
        partial.rename(out)
    dist.barrier()
    return {"dtype": str(stored).removeprefix("torch."), "out": str(out)}


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory of any size: merging tensors into fresh pages takes three times as long."""
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    libc = ctypes.CDLL(None)
    for parameter, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_arena_max, 1)):
        libc.mallopt(parameter, value)


def export_hf(megatron: Path, hf_dir: Path | None, out: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """torch_dist -> Hugging Face. One process: the format has every layout's tensors in one piece."""
    check_new(out)
    source = hf_dir or own_side_files(megatron)
    weights = TorchDistWeights(megatron, source)
    layout = weights.layout(dtype)
    stored = {tensor.dtype for tensor in layout}
    write_hf_folder(read_ahead(weights.hf_tensors()), layout, source, out, stored.pop() if len(stored) == 1 else None)
    return {"tensors": len(layout), "out": str(out)}


def export_with_bridge(
    megatron: Path, hf_dir: Path | None, out: Path, dtype: torch.dtype | None, flags: Sequence[str]
) -> dict[str, Any]:
    """The same by Megatron-Bridge, which holds the model. Collective over the ranks of the launch."""
    check_new(out)
    source = hf_dir or own_side_files(megatron)
    bridge = Bridge(source)
    embedding = read_metadata(checkpoint_folder(megatron) / ".metadata").state_dict_metadata.get(EMBEDDING)
    if embedding is None:
        raise UserError(f"{megatron} has no {EMBEDDING}: it is no checkpoint of a language model.")
    args, chunks = build_model(source, embedding.properties.dtype, [*flags, "--no-load-optim", "--no-load-rng"], bridge)
    args.load = str(megatron)
    checkpointing.load_checkpoint(chunks, None, None)
    layout = bridge.hf_layout(chunks, dtype)
    stored = {tensor.dtype for tensor in layout}
    stream = bridge.export_hf_weights(chunks)
    if dist.get_rank() == 0:
        write_hf_folder(stream, layout, source, out, stored.pop() if len(stored) == 1 else None)
    else:
        for _ in stream:
            pass
    dist.barrier()
    return {"tensors": len(layout), "out": str(out)}


def own_side_files(megatron: Path) -> Path:
    """The folder in an imported checkpoint that holds configuration and tokenizer. Raises UserError: there is none."""
    if not (megatron / SIDE_FILES).is_dir():
        raise UserError(
            f"{megatron} has no folder {SIDE_FILES!r} with config.json and tokenizer, as an imported checkpoint has: "
            f"name the model that training started from with --hf"
        )
    return megatron / SIDE_FILES


def verify(
    hf_dir: Path, megatron: Path, prompts: Path | None, dtype: torch.dtype | None, flags: Sequence[str]
) -> Parity:
    """Compare logits and layers. Collective over the ranks of the launch.

    Computes in the source's dtype; in fp32 if there are experts, since in bf16 rounding sends tokens to other experts.
    """
    compute = dtype or (torch.float32 if "num_experts" in architecture(hf_dir) else own_dtype(hf_dir))
    weights = TorchDistWeights(megatron, hf_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        for _ in weights.hf_tensors():  # names what is damaged; Megatron's loader would not
            pass
    tokens_BL = encode(prompts, hf_dir) if prompts else random_tokens(architecture(hf_dir)["vocab_size"])
    args, chunks = build_model(hf_dir, compute, [*flags, "--no-load-optim", "--no-load-rng"])
    args.load = str(megatron)
    checkpointing.load_checkpoint(chunks, None, None)
    return compare(chunks, hf_dir, tokens_BL, compute)


def random_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))


def encode(prompts: Path, hf_dir: Path) -> torch.Tensor:
    """The file's lines, padded at the right with token 0."""
    lines = [line for line in prompts.read_text().splitlines() if line.strip()] if prompts.is_file() else []
    if not lines:
        raise UserError(f"--prompts {prompts} holds no prompt: give a file with one prompt a line")
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    rows = [torch.tensor(tokenizer(line)["input_ids"], dtype=torch.long) for line in lines]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists: give a new folder")


def report(parity: Parity) -> dict[str, Any]:
    """What --json holds; printed in short."""
    verdict = "equal" if parity.equal else "NOT equal"
    print(f"logits: {parity.logits:.2e} of max |logit|, limit {parity.limit:.0e}: {verdict}")
    print(f"worst layer: {parity.worst} ({parity.errors[parity.worst]:.2e} of its largest value)")
    return {
        "equal": parity.equal,
        "logit_error": parity.logits,
        "limit": parity.limit,
        "worst_layer": parity.worst,
        "errors": parity.errors,
    }


def main(argv: Sequence[str]) -> int:
    ours, flags = parse(argv)
    dtype = DTYPES[ours.dtype] if ours.dtype else None
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    set_verbosity_error()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # Megatron prints a thousand lines
            if ours.command == "import":
                result: Any = import_hf(ours.hf, ours.out, dtype, flags, with_bridge=ours.bridge is not None)
            elif ours.command == "verify":
                result = verify(ours.hf, ours.megatron, ours.prompts, dtype, flags)
            elif ours.bridge:
                result = export_with_bridge(ours.megatron, ours.hf, ours.out, dtype, flags)
            else:
                build_parser().parse_args(flags)  # a layout makes no difference, a misspelt flag is a mistake
                result = export_hf(ours.megatron, ours.hf, ours.out, dtype) if first else {}
    except UserError as error:
        if first:
            print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return 0
    failed = isinstance(result, Parity) and not result.equal
    result = report(result) if isinstance(result, Parity) else result
    if ours.command != "verify":
        print(f"written to {result['out']}")
    if ours.json:
        ours.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

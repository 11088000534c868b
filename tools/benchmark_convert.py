"""Speed and memory of checkpoint conversion: a synthetic Qwen3 in bf16, imported and exported by one process.

    python tools/benchmark_convert.py [--json FILE] [--gigabytes 6] [--folder DIR]

`convert_over_copy` is the lower, over import and export, of the seconds of a plain copy of the Hugging Face folder /
the seconds of the conversion; start-up and imports do not count. `export_peak_gb` is the memory that export needs above
its imports. Each conversion runs in a process of its own, as tools/convert_checkpoint.py would; each round also copies.
The peak of import is in the rows. Needs three times the model's size on the disk, and as much memory for the sake of
equal conditions: all start with files cached, no writes outstanding, and free memory that is the machine's own.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import write_report
from safetensors import safe_open

from megatron_fipo.observe.environment import describe_environment

HIDDEN, FFN, VOCAB, HEADS, GROUPS = 2048, 6144, 32000, 16, 8
ROUNDS = 2


def write_model(folder: Path, gigabytes: float) -> int:
    """A folder of random weights with as many layers as the size asks for; the bytes of its weights."""
    import convert_checkpoint  # noqa: F401 (makes Megatron work here)
    from transformers import Qwen3Config

    from megatron_fipo.checkpoint.hf_files import HFTensor
    from megatron_fipo.checkpoint.hf_write import write_hf_folder
    from megatron_fipo.checkpoint.torch_dist import weight_map_of_config

    layer = 2 * (HIDDEN * 128 * (HEADS + GROUPS) * 2 + 3 * HIDDEN * FFN)
    layers = max(1, math.ceil((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / layer))
    source = folder.with_name("configuration")
    Qwen3Config(
        hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        head_dim=128, intermediate_size=FFN, vocab_size=VOCAB, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(source)  # fmt: skip
    (source / "tokenizer.json").write_text("{}")
    weight_map = weight_map_of_config(source, VOCAB)
    layout = [HFTensor(name, weight_map.hf_shape(name), torch.bfloat16) for name in weight_map.hf_names()]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in layout:
            yield tensor.name, torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05)

    write_hf_folder(tensors(), layout, source, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def convert(command: str, source: Path, out: Path) -> dict[str, float]:
    """One conversion in this process: its seconds, and its peak memory above what the imports left."""
    import convert_checkpoint

    settle(source)
    before, start = resident("VmRSS"), time.perf_counter()
    if command == "import":
        convert_checkpoint.import_hf(source, out, None, [])
    else:
        convert_checkpoint.export_hf(source, None, out, None)
    return {"seconds": time.perf_counter() - start, "peak_gb": (resident("VmHWM") - before) / 1e9}


def in_a_process(command: str, source: Path, out: Path) -> dict[str, float]:
    result = out.with_name("result.json")
    subprocess.run(
        [sys.executable, __file__, "--convert", command, source, out, result], check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(result.read_text())


def settle(source: Path) -> None:
    """Finish all writing, and use as much memory as the files of `source` will take, for a moment.

    A virtual machine may give free memory back to its host. Getting it again takes ten times as long as the copy, so
    that a copy right after files were removed, and a conversion after its start-up, would measure that.
    """
    os.sync()
    size = sum(file.stat().st_size for file in source.rglob("*"))
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)


def copy(source: Path, out: Path) -> dict[str, float]:
    settle(source)
    start = time.perf_counter()
    shutil.copytree(source, out)
    return {"seconds": time.perf_counter() - start, "peak_gb": 0.0}


def measure(root: Path, gigabytes: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Ratios and one row for each of copy, import and export."""
    hf, megatron, exported, copied = (root / name for name in ("hf", "megatron", "exported", "copied"))
    size = write_model(hf, gigabytes)
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "import": [], "export": []}
    for _ in range(ROUNDS):
        for old in (megatron, exported):
            shutil.rmtree(old, ignore_errors=True)
        runs["copy"].append(copy(hf, copied))
        shutil.rmtree(copied)
        runs["import"].append(in_a_process("import", hf, megatron))
        runs["export"].append(in_a_process("export", megatron, exported))
    check_equal(hf, exported)
    over_copy = {
        name: statistics.median(c["seconds"] / r["seconds"] for c, r in zip(runs["copy"], results, strict=True))
        for name, results in runs.items()
    }
    rows = [
        {
            "name": name,
            "gigabytes": size / 1e9,
            "seconds": statistics.median(r["seconds"] for r in results),
            "over_copy": over_copy[name],
            "peak_gb": max(r["peak_gb"] for r in results),
        }
        for name, results in runs.items()
    ]
    peak = max(r["peak_gb"] for r in runs["export"])
    return {"convert_over_copy": min(over_copy["import"], over_copy["export"]), "export_peak_gb": peak}, rows


def check_equal(expected: Path, found: Path) -> None:
    """Raises AssertionError if a tensor differs: a fast wrong conversion is worth nothing."""
    for theirs, ours in zip(sorted(expected.glob("*.safetensors")), sorted(found.glob("*.safetensors")), strict=True):
        with safe_open(theirs, "pt") as a, safe_open(ours, "pt") as b:
            assert a.keys() == b.keys()
            for name in a.keys():  # noqa: SIM118 (no mapping)
                assert torch.equal(a.get_tensor(name), b.get_tensor(name)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the model")
    parser.add_argument("--folder", help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    if args.convert:
        command, source, out, result = args.convert
        Path(result).write_text(json.dumps(convert(command, Path(source), Path(out))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        ratios, rows = measure(Path(root), args.gigabytes)
    print(f"\n  {'':8}{'GB':>8}{'seconds':>10}{'/ copy':>9}{'peak GB':>10}")
    for row in rows:
        numbers = f"{row['gigabytes']:8.2f}{row['seconds']:10.1f}{row['over_copy']:9.2f}{row['peak_gb']:10.2f}"
        print(f"  {row['name']:8}{numbers}")
    write_report(args.json, ratios, rows, describe_environment())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    main()

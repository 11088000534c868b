#!/usr/bin/env python
"""Memory and time of log-probs, forward and backward, by tiles and from full fp32 logits.

    python tools/benchmark_logprob.py [--json FILE]

Every variant runs in a process of its own. Memory is the peak of the resident set above what weight, its gradient and
hidden states take; time is CPU seconds of one thread, which other load on the machine changes least. Keys:
logprob_memory (full logits / ours, so more is better) and logprob_time (ours / full logits, less is better), both with
as many tokens as --tokens says. Ours also runs with four times the tokens, for its memory, on all cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.model.chunked_logprob import log_probs_of_labels
from megatron_fipo.observe.environment import describe_environment

MIB = 2**20


def from_full_logits(hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> Tensor:
    """The quickest of torch's own ways."""
    return -F.cross_entropy(hidden_RH @ weight_VH.t(), labels_R, reduction="none")


def by_tiles(hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> Tensor:
    return log_probs_of_labels(hidden_RH, weight_VH, labels_R, vocab_size=weight_VH.size(0))[0]


VARIANTS = {"full logits": from_full_logits, "ours": by_tiles}


def measure(variant: str, tokens: int, vocabulary: int, hidden: int, threads: int) -> dict[str, object]:
    """One forward and backward pass in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight_VH = torch.randn(vocabulary, hidden).mul_(hidden**-0.5).requires_grad_()
    hidden_RH = torch.randn(tokens, hidden, requires_grad=True)
    labels_R = torch.randint(0, vocabulary, (tokens,))
    upstream_R = torch.randn(tokens)
    before = resident_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    logp_R = VARIANTS[variant](hidden_RH, weight_VH, labels_R)
    (logp_R * upstream_R).sum().backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradient = 4 * weight_VH.numel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - gradient
    assert weight_VH.grad is not None and hidden_RH.grad is not None
    return {
        "variant": variant,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": hidden,
        "threads": threads,
        "peak_mib": peak / MIB,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        # That both variants compute the same.
        "checksums": [float(x.detach().double().abs().sum()) for x in (logp_R, hidden_RH.grad, weight_VH.grad)],
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_own_process(*job: object) -> dict:
    print(f"  measuring {job[0]}, {job[1]} tokens ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=152064, help="default: Qwen2.5's, padded")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write ratios, rows and environment there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one variant, in this process
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return

    shape = (args.vocabulary, args.hidden)
    full = in_own_process("full logits", args.tokens, *shape, 1)
    ours = in_own_process("ours", args.tokens, *shape, 1)
    long = in_own_process("ours", 4 * args.tokens, *shape, len(os.sched_getaffinity(0)))
    for one, other in zip(full["checksums"], ours["checksums"], strict=True):
        assert abs(one - other) <= 1e-4 * abs(one), "the variants disagree"
    ratios = {
        "logprob_memory": full["peak_mib"] / ours["peak_mib"],
        "logprob_time": ours["cpu_seconds"] / full["cpu_seconds"],
    }
    print(f"vocabulary {args.vocabulary:,}, hidden {args.hidden:,}, fp32")
    print(f"{'':13}{'tokens':>8}{'threads':>9}{'peak MiB':>10}{'CPU s':>8}{'wall s':>8}")
    for row in (full, ours, long):
        times = f"{row['cpu_seconds']:8.1f}{row['wall_seconds']:8.1f}"
        print(f"{row['variant']:13}{row['tokens']:8,}{row['threads']:9}{row['peak_mib']:10,.0f}{times}")
    print(f"logprob_memory {ratios['logprob_memory']:.1f} (>= 10 wanted)")
    print(f"logprob_time   {ratios['logprob_time']:.2f} (<= 1.15 wanted)")
    if args.json:
        report = {"ratios": ratios, "rows": [full, ours, long], "environment": describe_environment()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

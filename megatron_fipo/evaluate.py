"""Accuracy of a model on held-out prompts: avg@N, pass@k, cons@N, lengths.

    python -m megatron_fipo.evaluate --hf-model DIR --eval-data aime24:aime24.jsonl:32 --out evaluations/base
    torchrun --nproc-per-node 8 -m megatron_fipo.evaluate --hf-model DIR --load RUN/checkpoints --eval-data ...

Flags are training's (presets included: --eval-top-p, --rollout-max-tokens, parallel sizes, engines), and two of its
own. DIR of --out gets metrics.json and every response of a set in NAME.jsonl. The weights are --hf-model's or --load's.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fipo import compat
from megatron_fipo.arguments import parse_arguments
from megatron_fipo.errors import UserError
from megatron_fipo.evaluation.accuracy import Evaluation, evaluate_sets
from megatron_fipo.inputs import Inputs, read_inputs
from megatron_fipo.observe.console import Console
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.session import as_one_rank, load_model, megatron_log, open_engine, open_responder, report


def evaluate(args: argparse.Namespace, inputs: Inputs, out: Path) -> dict[str, Any] | None:
    """Evaluate every set and write ``out``; what metrics.json holds, None on ranks other than the first."""
    first = args.rank == 0
    console = Console(1, enabled=first)
    if first:
        out.mkdir(parents=True, exist_ok=True)
    with megatron_log(out / "megatron.log" if first else Path(os.devnull)):
        chunks = load_model(args, console.note)
    replicas = Replicas.current()
    sampling = SamplingParams(args.rollout_max_tokens, 1.0, args.eval_top_p, inputs.answers.stop_token_ids)
    with contextlib.closing(open_engine(args, RunFolder(out.parent, out.name), chunks, replicas)) as engine:
        engine.update_weights(0)
        responder = open_responder(args, inputs, engine, replicas)
        evaluation = evaluate_sets(responder, inputs.eval_sets, sampling, inputs.answers, replicas, args.seed, console)
    records = _gather_records(evaluation, replicas)
    if not first:
        return None
    for name, rows in records.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (out / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    result = {
        "model": args.load_run or args.hf_model,
        "sampling": {"temperature": 1.0, "top_p": args.eval_top_p, "max_tokens": args.rollout_max_tokens},
        "seed": args.seed,
        "sets": {name: _metrics_of(name, evaluation.metrics) for name in records},
    }
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _gather_records(evaluation: Evaluation, replicas: Replicas) -> dict[str, list[dict[str, Any]]]:
    """All replicas' responses on the first, in the order of the prompts."""
    parts: list[Any] = [None] * replicas.size
    dist.all_gather_object(parts, evaluation.records, group=replicas.group)
    return {
        name: sorted((row for part in parts for row in part[name]), key=lambda row: (row["number"], row["sample"]))
        for name in evaluation.records
    }


def _metrics_of(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    prefix = f"eval/{name}/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def describe(name: str, metrics: Mapping[str, float]) -> str:
    """One line for people."""
    samples = int(metrics["responses"] // metrics["n"])
    at_k = [f"{key} {100 * metrics[key]:.1f} %" for key in (f"pass@{samples}", f"cons@{samples}") if key in metrics]
    errors = [f"{metrics['errors']:,.0f} verifier errors"] if metrics["errors"] else []
    return ", ".join(
        [
            f"{name}: avg@{samples} {100 * metrics['accuracy']:.1f} % "
            f"(95 % CI {100 * metrics['accuracy_low']:.1f}-{100 * metrics['accuracy_high']:.1f})",
            *at_k,
            f"greedy {100 * metrics['greedy_accuracy']:.1f} %",
            f"length {metrics['length_mean']:,.0f} (median {metrics['length_median']:,.0f})",
            f"truncated {100 * metrics['truncated_fraction']:.1f} %",
            f"{metrics['n']:,.0f} problems",
            *errors,
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 2 for a mistake that the user can mend, told in one line on stderr."""
    own = argparse.ArgumentParser(prog="megatron_fipo.evaluate", add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, metavar="DIR")
    own.add_argument("--json", type=Path, metavar="FILE")
    ours, rest = own.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(__doc__, "\nof its own:\n  --out DIR    a new folder\n  --json FILE  metrics.json there, too", sep="")
        return 0
    compat.install()
    try:
        as_one_rank()
        if ours.out is None:
            raise UserError("--out is missing: give a new folder for metrics and responses")
        if (ours.out / "metrics.json").exists() and "--dry-run" not in rest:
            raise UserError(f"--out {ours.out} already holds an evaluation; give a new folder")
        args = parse_arguments(rest, training=False)
        inputs = read_inputs(args)
        if args.dry_run:
            print(json.dumps(inputs.counts(), indent=2))
            return 0
        result = evaluate(args, inputs, ours.out)
        dist.destroy_process_group()
    except UserError as error:
        report(error)
        return 2
    if result is not None:
        for name, metrics in result["sets"].items():
            print(describe(name, metrics))
        if ours.json:
            ours.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

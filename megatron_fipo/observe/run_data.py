"""Reads a run's folder back: for the report and for anything that compares runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.observe.run_folder import RunFolder, read_jsonl
from megatron_fipo.observe.statistics import wilson_interval


@dataclass(frozen=True)
class RunData:
    """One run as its files tell it; files that are not there (a run still going, or killed) are empty here."""

    name: str
    path: Path
    rows: Sequence[dict[str, Any]]  # metrics.jsonl, by step; the row of step 0 has only evaluation keys
    samples: Sequence[dict[str, Any]]
    summary: dict[str, Any]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    damaged_lines: int  # of metrics.jsonl and samples.jsonl together

    def series(self, key: str) -> tuple[list[float], list[float | None]]:
        """(steps, values) of the rows that have `key`; None where the value was not finite."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def values(self, key: str) -> list[float]:
        """Finite values of `key`, in step order."""
        return [value for value in self.series(key)[1] if value is not None]

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the evaluation sets, in order of appearance."""
        keys = (key for row in self.rows for key in row if key.startswith("eval/") and key.endswith("/accuracy"))
        return list(dict.fromkeys(key.removeprefix("eval/").removesuffix("/accuracy") for key in keys))


def load_run(path: Path) -> RunData:
    """Read the run folder `path`. Raises UserError if it is none, or holds no step."""
    folder = RunFolder(path.resolve().parent, path.resolve().name)
    if not path.is_dir():
        raise UserError(f"Run folder {path} does not exist: give a folder such as runs/NAME that training wrote.")
    if not folder.metrics.exists():
        raise UserError(f"Run folder {path} has no metrics.jsonl: give a folder such as runs/NAME that training wrote.")
    rows, damaged = read_jsonl(folder.metrics)
    if not rows:
        raise UserError(f"{folder.metrics} has no complete step yet: wait for the first step or give another run.")
    samples, damaged_samples = read_jsonl(folder.samples) if folder.samples.exists() else ([], 0)
    return RunData(
        name=folder.name,
        path=path,
        rows=sorted(rows, key=lambda row: row["step"]),
        samples=samples,
        summary=_read_json(folder.summary),
        arguments=_read_json(folder.arguments),
        environment=_read_json(folder.environment),
        damaged_lines=damaged + damaged_samples,
    )


def headline(run: RunData) -> dict[str, Any]:
    """The numbers of a run's first line. Accuracies are {"value", "low", "high", "n"} with a 95 % interval, or None."""
    response_rates = run.values("perf/response_tokens_per_second")
    active = run.values("fipo/active_fraction")
    seconds = run.summary.get("train_seconds")
    return {
        "run": run.name,
        "status": run.summary.get("status", "not finished"),
        "steps": max(row["step"] for row in run.rows),
        "seed": run.summary.get("seed"),
        "evaluation": next(iter(run.evaluation_names), None),
        "accuracy_before": _accuracy(run, "accuracy", 0),
        "accuracy_after": _accuracy(run, "accuracy", -1),
        "greedy_before": _accuracy(run, "greedy_accuracy", 0),
        "greedy_after": _accuracy(run, "greedy_accuracy", -1),
        "train_seconds": seconds if seconds is not None else sum(run.values("time/step")),
        "active_fraction_mean": fmean(active) if active else None,
        "response_tokens_per_second": median(response_rates) if response_rates else None,
        "damaged_lines": run.damaged_lines,
    }


def _accuracy(run: RunData, kind: str, which: int) -> dict[str, float | int] | None:
    """First (`which` 0) or last (-1) value on the first evaluation set. A single evaluation has no "after"."""
    if not run.evaluation_names:
        return None
    key = f"eval/{run.evaluation_names[0]}"
    rows = [row for row in run.rows if row.get(f"{key}/{kind}") is not None]
    if not rows or (which == -1 and len(rows) < 2):
        return None
    value, n = rows[which][f"{key}/{kind}"], int(rows[which][f"{key}/n"])
    low, high = wilson_interval(value, n)
    return {"value": value, "low": low, "high": high, "n": n}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore or delete it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: restore or delete it.")
    return value

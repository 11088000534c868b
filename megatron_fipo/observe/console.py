"""What a person watching a run sees: derived values, live progress, one line per step, the result.

On a terminal `rich` draws progress bars inside the step; anywhere else (a file, a pipe, a Slurm log) the same lines
come as plain text without control characters.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from megatron_fipo.observe.overview import Number
from megatron_fipo.observe.statistics import wilson_interval


@dataclass(frozen=True)
class Column:
    """One column of the step lines: title, key in metrics.jsonl, format of the value, unit factor."""

    title: str
    key: str
    width: int
    format: str
    factor: float = 1.0


COLUMNS = (
    Column("reward", "reward/mean", 7, "+.3f"),
    Column("acc %", "reward/accuracy", 6, ".1f", 100.0),
    Column("length", "response/length_mean", 8, ",.1f"),
    Column("entropy", "actor/entropy", 8, ".4f"),
    Column("KL", "actor/ppo_kl", 9, "+.5f"),
    Column("f!=1 %", "fipo/active_fraction", 7, ".1f", 100.0),
    Column("tok/s", "perf/response_tokens_per_second", 9, ",.0f"),
    Column("sec", "time/step", 7, ",.1f"),
)


class Progress:
    """Handle of a live bar; does nothing where none is drawn."""

    def __init__(self, bar: RichProgress | None = None, task: TaskID | None = None) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: float = 1) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)


class Console:
    """Terminal output of a run. Give `enabled=False` on every process but one: all calls then do nothing."""

    def __init__(self, total_steps: int, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._enabled = enabled
        self._total_steps = total_steps
        self._header_printed = False
        self._live = stream.isatty()
        # force_terminal: rich would otherwise send colours into a file when FORCE_COLOR is set. soft_wrap: no folding.
        self._out = RichConsole(file=stream, force_terminal=self._live, highlight=False, soft_wrap=True)

    def banner(self, values: Mapping[str, object]) -> None:
        """Table of the values that a run derives from its flags (batch arithmetic, layout, engine, device)."""
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            self._print(Text.assemble((f"  {name:<{width}}", "dim"), f"  {_plain(value)}"))
        self._print(Text())

    def note(self, text: str) -> None:
        """One line about something that the user should know."""
        self._print(Text(_plain(text), style="yellow"))

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """Live bar of one phase of the current step ("rollout": samples, "update": micro-batches); gone at its end."""
        if not (self._enabled and self._live):
            yield Progress()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        with RichProgress(*columns, *times, console=self._out, transient=True) as bar:
            yield Progress(bar, bar.add_task(f"  {name}", total=total))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One line of the step's main numbers; `metrics` as in metrics.jsonl, "-" for a key that is not there."""
        width = max(4, 2 * len(str(self._total_steps)) + 1)
        if not self._header_printed:
            titles = "".join(f"{column.title:>{column.width}}" for column in COLUMNS)
            self._print(Text(f"{'step':>{width}}{titles}", style="bold"))
            self._header_printed = True
        numbers = "".join(f"{_cell(metrics.get(column.key), column):>{column.width}}" for column in COLUMNS)
        step = f"{metrics['step']}/{self._total_steps}"
        self._print(Text(f"{step:>{width}}{numbers}"))

    def evaluation(self, name: str, metrics: Mapping[str, Any]) -> None:
        """One line for the evaluation set `name`; `metrics` holds its "eval/NAME/..." keys of metrics.jsonl."""

        def get(key: str) -> Any:
            return metrics.get(f"eval/{name}/{key}")

        n = int(get("n"))
        low, high = wilson_interval(get("accuracy"), n)
        parts = [f"sampled {_percent(get('accuracy'))} (95 % CI {100 * low:.1f}-{100 * high:.1f})"]
        if get("greedy_accuracy") is not None:
            parts.append(f"greedy {_percent(get('greedy_accuracy'))}")
        if get("length_mean") is not None:
            parts.append(f"length {get('length_mean'):,.1f}")
        self._print(Text(f"  {name}: {', '.join(parts)}, {n:,} problems", style="cyan"))

    def finish(
        self,
        summary: Mapping[str, Any],
        numbers: Sequence[Number],
        samples: Sequence[Mapping[str, Any]],
        report_path: Path | str,
    ) -> None:
        """Accuracy before and after, the run's numbers, its alarms, sampled answers, and where the report lies;
        `summary` as in summary.json."""
        self._print(Text())
        for label, key in (("sampled", "accuracy"), ("greedy", "greedy")):
            before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
            if before is not None and after is not None:
                change = f"{100 * (after - before):+.1f} points"
                line = f"accuracy, {label:<13} {_percent(before)} -> {_percent(after)}"
                self._print(Text.assemble((line, "bold"), f"  ({change})"))
        for label, value, note in numbers:
            self._print(Text.assemble(f"{label:<23} {value:<17} ", (note, "dim")))
        if summary.get("train_seconds") is not None:
            self._print(Text(f"{'training':<23} {summary.get('steps')} steps in {summary['train_seconds']:,.1f} s"))
        for alarm in summary.get("alarms", ()):
            self.note(f"alarm at step {alarm['step']}: {alarm['text']}")
        if samples:
            self._print(Text())
        for sample in samples:
            verdict = ("right", "green") if sample["correct"] else (f"wrong, answer {_plain(sample['answer'])}", "red")
            text = f"{_one_line(sample['prompt'])} {_one_line(sample['response'])}"
            self._print(Text.assemble((f"  {sample['when']:<7}", "dim"), f"{text}  ", (f"[{verdict[0]}]", verdict[1])))
        self._print(Text(f"\nreport  {report_path}"))

    def _print(self, text: Text) -> None:
        if self._enabled:
            self._out.print(text, overflow="ignore", no_wrap=True, crop=False)


def _cell(value: Any, column: Column) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else f"{value}"
    return format(value * column.factor, column.format)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _plain(value: object) -> str:
    """Text of a value; a model's answer may hold control characters, which a terminal would obey."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _one_line(text: str, limit: int = 160) -> str:
    shown = _plain(text.replace("\n", "\\n"))
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"

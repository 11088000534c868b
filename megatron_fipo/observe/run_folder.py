"""The folder `RUNS_DIR/NAME/` of one run: where each file lies, how it is written, how a resume cuts it back."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.observe.environment import describe_environment


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Creating the object touches no file; `create()` makes the folder."""

    runs_dir: Path
    name: str

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise UserError(
                f"--run-name is {self.name!r}, but must be one folder name without '/': give e.g. 'my-run'."
            )

    @property
    def path(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def arguments(self) -> Path:
        return self.path / "arguments.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the folder (parents included); an existing one is left as it is."""
        self.path.mkdir(parents=True, exist_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, summary)

    def write_arguments(self, arguments: Mapping[str, Any]) -> None:
        """`arguments`: `vars(args)`; values that JSON has no form for (dtypes, functions) are written as their text."""
        write_json(self.arguments, arguments)

    def write_environment(self) -> None:
        write_json(self.environment, describe_environment())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl and samples.jsonl that belong to steps after `step`, before a resume there.

        A run killed between the metrics of step k+1 and its checkpoint repeats step k+1; without this the step would
        stand in the files twice. A damaged line (a write cut short) has no step and goes too, as do the answers after
        training, which the end of the continued run gives anew.
        """
        for file in (self.metrics, self.samples):
            if file.exists():
                rows, _ = read_jsonl(file)
                kept = (row for row in rows if row["step"] <= step and row.get("when") != "after")
                write_text(file, "".join(map(to_json_line, kept)))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, atomically; what JSON has no form for is written as its text, NaN as null."""
    write_text(path, json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def to_json_line(row: Mapping[str, Any]) -> str:
    """One JSON object and a newline; NaN and infinities, for which JSON has no form, become null."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file that have a `step`, and the number of other (damaged) lines."""
    rows, damaged = [], 0
    # A write cut short may end inside a UTF-8 sequence: "replace" leaves that to the JSON parser's verdict on the line.
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

"""Metrics of each step to metrics.jsonl, TensorBoard and trackers, sampled answers to samples.jsonl."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from megatron_fipo.observe.alarms import HISTORY
from megatron_fipo.observe.run_folder import RunFolder, read_jsonl, to_json_line
from megatron_fipo.observe.trackers import Tracker


class MetricWriter:
    """Appends to a run's files; on one process only.

    After a resume call `RunFolder.truncate_after` first: step and update numbers go on from what the files hold, and
    TensorBoard is told to hide the events of steps that will be repeated.
    TensorBoard gets two series: `tensorboard/steps` over the step, `tensorboard/updates` over the optimizer update
    counted from the start of the run. `history` holds the last rows, those from before a resume included.
    """

    def __init__(self, folder: RunFolder, trackers: Sequence[Tracker] = ()) -> None:
        folder.create()
        rows = read_jsonl(folder.metrics)[0] if folder.metrics.exists() else []
        self.history: deque[dict[str, Any]] = deque(rows, maxlen=HISTORY)
        self._updates_done = sum(len(row.get("updates", ())) for row in rows)
        self._metrics = _append(folder.metrics)
        self._samples = _append(folder.samples)
        purge_step = rows[-1]["step"] + 1 if rows else 0
        self._trackers = trackers
        self._steps = SummaryWriter(str(folder.tensorboard / "steps"), purge_step=purge_step)
        self._updates = SummaryWriter(str(folder.tensorboard / "updates"), purge_step=self._updates_done)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write one step: numbers (Python, NumPy or zero-dimensional tensors), an integer "step", a list "updates", and
        "alarms" {kind: text}."""
        step = int(metrics["step"])
        scalars = {key: float(value) for key, value in metrics.items() if key not in ("step", "updates", "alarms")}
        updates = [{key: float(value) for key, value in update.items()} for update in metrics.get("updates", ())]
        row: dict[str, Any] = {"step": step, **scalars}
        if updates:
            row["updates"] = updates
        alarms = metrics.get("alarms", {})
        if alarms:
            row["alarms"] = dict(alarms)
        self.history.append(row)
        self._metrics.write(to_json_line(row))
        self._metrics.flush()
        for key, value in scalars.items():
            if key != "time":  # TensorBoard records the wall time of every event itself
                self._steps.add_scalar(key, value, step)
        for kind, text in alarms.items():
            self._steps.add_text(f"alarms/{kind}", text, step)
        for update in updates:
            for key, value in update.items():
                self._updates.add_scalar(key, value, self._updates_done)
            self._updates_done += 1
        for tracker in self._trackers:
            finite = {key: value for key, value in scalars.items() if key != "time" and math.isfinite(value)}
            tracker.log(step, finite)
        self._steps.flush()
        self._updates.flush()

    def write_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append sampled answers: {"step", "when": "before" | "after" | "step", "prompt", "response", "answer",
        "correct"}."""
        for sample in samples:
            self._samples.write(to_json_line(sample))
        self._samples.flush()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        self._steps.close()
        self._updates.close()
        for tracker in self._trackers:
            tracker.close()


def _append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")

"""Metrics to Weights & Biases and MLflow, each served by a process of its own.

    python -m megatron_fipo.observe.trackers {wandb,mlflow} RUN_FOLDER SETTINGS     (started by `Tracker`)

The process reads one JSON object per step from its standard input until that ends. Whatever its client library does
- waiting for a server that is not there, retrying, hooks at exit - training neither waits for it nor dies of it.
Neither torch nor Megatron is imported here.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.observe.run_folder import RunFolder

CLOSE_SECONDS = 30.0
"""What a tracker gets at the end of a run to send what is left."""

MAX_PENDING = 32 * 2**20
"""Bytes that wait for a tracker; a step has some ten thousand."""


class Tracker:
    """The training process's end of one tracker. A tracker that fails is told of once and left."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        settings: Mapping[str, str | None],
        note: Callable[[str], None],
        *,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """kind: "wandb" or "mlflow"; its output goes to FOLDER/KIND.log, the identity of its run to FOLDER/KIND.id."""
        self._kind, self._note, self._close_seconds = kind, note, close_seconds
        self._log = folder / f"{kind}.log"
        self._pending = bytearray()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fipo.observe.trackers", kind, str(folder), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # a signal to the job's processes is not for it: it ends with its input
            )
        assert self._process.stdin is not None
        self._pipe: int | None = os.dup(self._process.stdin.fileno())
        self._process.stdin.close()
        os.set_blocking(self._pipe, False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over one step; returns at once."""
        if self._pipe is None:
            return
        if len(self._pending) > MAX_PENDING:
            self._give_up(f"does not take its metrics, {len(self._pending) >> 20} MB wait for it")
            return
        self._pending += json.dumps({"step": step, "values": dict(values)}).encode() + b"\n"
        self._send()

    def close(self) -> None:
        """Let the tracker send what it has, for a limited time."""
        deadline = time.monotonic() + self._close_seconds
        while self._pipe is not None and self._pending and time.monotonic() < deadline:
            select.select([], [self._pipe], [], 0.2)
            self._send()
        if self._pipe is None:
            return
        os.close(self._pipe)
        self._pipe = None
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._kill()
            self._note(f"{self._kind}: not everything was sent in {self._close_seconds:g} s; see {self._log}")
            return
        if self._process.returncode:
            self._note(f"{self._kind}: it ended with {self._reason()}")

    def _send(self) -> None:
        assert self._pipe is not None
        try:
            while self._pending:
                sent = os.write(self._pipe, self._pending)
                del self._pending[:sent]
        except BlockingIOError:  # the pipe is full: the rest goes with the next step
            return
        except BrokenPipeError:
            self._process.wait()
            self._give_up(f"it ended with {self._reason()}")

    def _give_up(self, reason: str) -> None:
        assert self._pipe is not None
        os.close(self._pipe)
        self._pipe = None
        self._kill()
        self._note(f"{self._kind}: {reason}; from here on metrics go to the run's folder only")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what the client started, too
        self._process.wait()

    def _reason(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word") + f" (see {self._log})"


def open_trackers(
    wandb: Mapping[str, str | None], folder: RunFolder, note: Callable[[str], None], *, continues: bool
) -> list[Tracker]:
    """Those that are switched on: W&B by its project in ``wandb``, MLflow by MLFLOW_TRACKING_URI.

    A run that ``continues`` goes on in the trackers' runs, another one begins new ones.
    """
    wanted: dict[str, Mapping[str, str | None]] = {}
    if wandb["project"]:
        wanted["wandb"] = wandb
    if os.environ.get("MLFLOW_TRACKING_URI"):
        wanted["mlflow"] = {"name": wandb["name"]}
    trackers = []
    for kind, settings in wanted.items():
        if importlib.util.find_spec(kind) is None:
            note(f"{kind} is not installed and gets no metrics; pip install 'megatron-fipo[{kind}]'")
            continue
        if not continues:
            (folder.path / f"{kind}.id").unlink(missing_ok=True)
        trackers.append(Tracker(kind, folder.path, settings, note))
    return trackers


class Client(Protocol):
    """A tracker's own library."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. Its environment variables hold: WANDB_MODE=offline writes to the folder alone."""

    def __init__(self, folder: Path, settings: Mapping[str, str | None]) -> None:
        import wandb

        identity = folder / "wandb.id"
        known = identity.read_text() if identity.exists() else secrets.token_hex(4)
        self._run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            name=settings["name"] or folder.name,
            dir=settings["dir"] or str(folder),
            config=_arguments(folder),
            id=known,
            resume="allow",
            settings=wandb.Settings(finish_timeout=CLOSE_SECONDS, console="off"),
        )
        identity.write_text(known)
        # A resumed run repeats steps, which W&B's own counter refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, where MLFLOW_TRACKING_URI says, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: Path, settings: Mapping[str, str | None]) -> None:
        import mlflow

        self._mlflow = mlflow
        identity = folder / "mlflow.id"
        if identity.exists():
            mlflow.start_run(run_id=identity.read_text())
            return
        run = mlflow.start_run(run_name=settings["name"] or folder.name)
        identity.write_text(run.info.run_id)
        arguments = [(key, str(value)) for key, value in _arguments(folder).items() if value is not None]
        for i in range(0, len(arguments), 100):  # as many as a request takes
            mlflow.log_params({key: value[:500] for key, value in arguments[i : i + 100]})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _arguments(folder: Path) -> dict[str, Any]:
    path = folder / "arguments.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main(kind: str, folder: str, settings: str) -> None:
    """Serve one tracker until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    clients: dict[str, Callable[[Path, Mapping[str, str | None]], Client]] = {"wandb": Wandb, "mlflow": Mlflow}
    client = clients[kind](Path(folder), json.loads(settings))
    for line in sys.stdin:
        row = json.loads(line)
        client.log(row["step"], row["values"])
    # A training process that was killed kills nobody: the process must end by itself, whatever the client waits for.
    watchdog = threading.Timer(2 * CLOSE_SECONDS, lambda: os._exit(1))
    watchdog.daemon = True
    watchdog.start()
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

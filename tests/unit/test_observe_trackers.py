"""Trackers: real clients where they are installed, and what training sees of those that fail or hang."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.trackers import MAX_PENDING, Tracker, open_trackers
from megatron_fipo.observe.writers import MetricWriter

OFF = {"project": None, "name": None, "entity": None, "dir": None}
SETTINGS = OFF | {"project": "tests", "name": "a run"}
needs = {
    kind: pytest.mark.skipif(importlib.util.find_spec(kind) is None, reason=f"{kind} is not installed")
    for kind in ("wandb", "mlflow")
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path, "run")
    run.create()
    run.write_arguments({"lr": 1e-6, "preset": "fipo-32b", "nothing": None})
    return run


@pytest.fixture
def silent_server():
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def train(folder: RunFolder, wandb: dict, steps: range, notes: list[str], *, continues: bool = False) -> None:
    trackers = open_trackers(wandb, folder, notes.append, continues=continues)
    assert len(trackers) == 1
    with MetricWriter(folder, trackers) as writer:
        for step in steps:
            writer.write({"step": step, "time": 1.8e9, "reward/mean": step / 8, "actor/grad_norm": float("nan")})


@needs["mlflow"]
def test_mlflow_keeps_a_run_that_is_resumed(folder, tmp_path, monkeypatch):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db" if importlib.util.find_spec("sqlalchemy") else f"file://{tmp_path}/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "fipo")
    notes: list[str] = []
    train(folder, OFF, range(1, 4), notes)
    train(folder, OFF, range(4, 6), notes, continues=True)
    assert notes == []
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fipo").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1e-06", "preset": "fipo-32b"}
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(point.step, point.value) for point in history] == [(step, step / 8) for step in range(1, 6)]
    assert "actor/grad_norm" not in run.data.metrics and "time" not in run.data.metrics
    train(folder, OFF, range(1, 2), notes)  # starts over: a new run
    assert len(client.search_runs([client.get_experiment_by_name("fipo").experiment_id])) == 2


@needs["wandb"]
def test_wandb_offline(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    notes: list[str] = []
    train(folder, SETTINGS, range(1, 4), notes)
    identity = (folder.path / "wandb.id").read_text()
    train(folder, SETTINGS, range(3, 6), notes, continues=True)
    assert notes == []
    runs = sorted((folder.path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(identity in run.name for run in runs)
    for run, last in zip(runs, (3, 5), strict=True):
        (file,) = run.glob("*.wandb")
        assert b"fipo-32b" in file.read_bytes()  # the arguments
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(run)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert re.search(rf"^run +a run \({identity}\)$", told, flags=re.M) and "finished" in told
        assert re.search(rf"^  reward/mean +{last / 8}$", told, flags=re.M)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=mark) for kind, mark in needs.items()])
def test_a_server_that_never_answers(kind, folder, silent_server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    bounded(Tracker(kind, folder.path, SETTINGS, (notes := []).append, close_seconds=1.0), notes, kind)


def bounded(tracker: Tracker, notes: list[str], kind: str) -> None:
    """Steps and end cost no more than they may, and one line tells."""
    start = time.monotonic()
    for step in range(50):
        tracker.log(step, {f"metric/{i}": 0.5 for i in range(300)})
    tracker.close()
    assert time.monotonic() - start < 30  # 1 s to close, and a machine that is busy
    assert len(notes) == 1 and notes[0].startswith(f"{kind}: not everything was sent in 1 s")
    assert tracker._process.returncode is not None


@pytest.fixture
def client(tmp_path, monkeypatch):
    """client(source): a module of that source in wandb's place, for what no real client does when asked to."""

    def write(source: str) -> None:
        (tmp_path / "wandb.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return write


def test_a_client_that_hangs(client, folder):
    client("import time\ntime.sleep(3600)\n")
    bounded(Tracker("wandb", folder.path, SETTINGS, (notes := []).append, close_seconds=1.0), notes, "wandb")


def test_a_client_that_fails_is_told_of_once_and_left(client, folder):
    client("raise ConnectionError('no such project')\n")
    tracker = Tracker("wandb", folder.path, SETTINGS, (notes := []).append)
    tracker._process.wait(60)
    for step in range(5):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    (note,) = notes
    assert note.startswith("wandb: it ended with ConnectionError: no such project (see ")
    assert note.endswith("wandb.log); from here on metrics go to the run's folder only")


def test_a_client_that_fails_at_its_end(client, folder):
    client(
        "class Run:\n    def define_metric(self, *a, **k): pass\n    log = define_metric\n"
        "    def finish(self): raise OSError('disk full')\n"
        "def init(**k): return Run()\ndef Settings(**k): pass\n"
    )
    tracker = Tracker("wandb", folder.path, SETTINGS, (notes := []).append)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert len(notes) == 1 and notes[0].startswith("wandb: it ended with OSError: disk full")


def test_what_waits_for_a_tracker_is_bounded(client, folder):
    client("import time\ntime.sleep(3600)\n")
    tracker = Tracker("wandb", folder.path, SETTINGS, (notes := []).append, close_seconds=1.0)
    for step in range(5):
        tracker.log(step, {f"metric {i} {'x' * 1000}": 0.5 for i in range(MAX_PENDING // 4000)})
    assert len(notes) == 1 and "does not take its metrics" in notes[0]
    tracker.close()
    assert len(notes) == 1


def test_the_tracker_ends_with_the_training_process(client, folder):
    """Which may be killed before it can say so: the end of its pipe is enough."""
    client(
        "class Run:\n    def define_metric(self, *a, **k): pass\n    log = define_metric\n"
        f"    def finish(self): open({str(folder.path / 'finished')!r}, 'w')\n"
        "def init(**k): return Run()\ndef Settings(**k): pass\n"
    )
    tracker = Tracker("wandb", folder.path, SETTINGS, print)
    os.close(tracker._pipe)
    assert tracker._process.wait(60) == 0
    assert (folder.path / "finished").exists()


def test_a_tracker_that_is_not_installed_is_told_of(folder, monkeypatch):
    notes: list[str] = []
    assert open_trackers(OFF, folder, notes.append, continues=False) == [] and notes == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_trackers(OFF, folder, notes.append, continues=False) == []
    assert notes == ["mlflow is not installed and gets no metrics; pip install 'megatron-fipo[mlflow]'"]

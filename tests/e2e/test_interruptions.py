"""Runs that are killed or asked to stop, started again by the same command, equal the run that nothing disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_training import SMALL, finished, rows, train, without_clock

from megatron_fipo.checkpoint.state import whole_checkpoints
from megatron_fipo.checkpoint.torch_dist import TRACKER, TorchDistWeights

STEPS = 10


def flags(runs: Path, *more: object) -> tuple[object, ...]:
    saves = ("--save-interval", 2, "--keep-last", 5, "--save-hf", runs / "hf")
    return ("--run-name", "run", "--num-steps", STEPS, *saves, *more)


@pytest.fixture(scope="module")
def whole(trained_base, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    runs = tmp_path_factory.mktemp("whole")
    finished(train(2, runs, trained_base, *flags(runs)))
    return runs


@contextmanager
def started(runs: Path, base: Path, *more: object) -> Iterator[subprocess.Popen]:
    """A run in the background; whatever is left of it is killed at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "megatron_fipo.train", *SMALL.split(), "--hf-model", base, "--runs-dir", runs]
    command += ["--prompt-data", base / "train.jsonl", "--eval-data", f"heldout:{base / 'heldout.jsonl'}:1"]
    with open(runs / "log", "a+") as log:
        process = subprocess.Popen(
            [*map(str, command), *map(str, flags(runs, *more))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        kill(process)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "megatron_fipo.train" in child.cmdline()]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for launcher, ranks and their writers at once, as when a machine goes away."""
    if process.poll() is not None:
        return
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in everything:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(30)
    psutil.wait_procs(everything, 30)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, runs: Path) -> None:
    limit = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, (runs / "log").read_text()[-4000:]
        assert time.monotonic() < limit, (runs / "log").read_text()[-4000:]
        time.sleep(0.01)


def lines(runs: Path) -> int:
    metrics = runs / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def assert_equal(runs: Path, whole: Path) -> None:
    """Metrics but for times, and weights, bit for bit."""
    assert [*map(without_clock, rows(runs / "run"))] == [*map(without_clock, rows(whole / "run"))]
    assert json.loads((runs / "run" / "summary.json").read_text())["status"] == "finished"
    expected, found = (load_file(folder / "hf" / "model.safetensors") for folder in (whole, runs))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def assert_hf_folder_is_of_a_checkpoint(runs: Path, base: Path) -> None:
    """--save-hf has left a model, bit for bit that of one of the checkpoints."""
    written, equal = load_file(runs / "hf" / "model.safetensors"), []
    for step in whole_checkpoints(runs / "run" / "checkpoints"):
        (runs / "run" / "checkpoints" / TRACKER).write_text(str(step))  # the last one named is the newest again
        weights = dict(TorchDistWeights(runs / "run" / "checkpoints", base).hf_tensors())
        equal.append(all(torch.equal(weights[name], written[name]) for name in written))
    assert sum(equal) == 1


@pytest.mark.parametrize(
    ("moments", "seed"), [(3, 1), *(pytest.param(10, seed, marks=pytest.mark.long) for seed in (2, 3))]
)
def test_sigkill_at_random_moments_changes_nothing(whole, trained_base, tmp_path, moments, seed):
    print("seed", seed)
    rng = random.Random(seed)
    for row in sorted(rng.choices(range(1, STEPS + 1), k=moments)):
        with started(tmp_path, trained_base) as process:
            wait_for(lambda row=row: lines(tmp_path) >= row, process, tmp_path)
            time.sleep(rng.random() * 0.3)  # a run that goes on may be killed before it has begun to
            kill(process)
        assert process.returncode == -signal.SIGKILL
    output = finished(train(2, tmp_path, trained_base, *flags(tmp_path)))
    assert "continuing" in output
    assert_equal(tmp_path, whole)

    (tmp_path / "run" / "summary.json").unlink()  # as if killed between its last checkpoint and its last words
    shutil.rmtree(tmp_path / "hf")
    finished(train(2, tmp_path, trained_base, *flags(tmp_path)))
    assert_equal(tmp_path, whole)


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(whole, trained_base, tmp_path):
    """SIGUSR1 to a single rank, then SIGTERM to the launcher, which passes it on, as Slurm ends a job."""
    stopped_at = []
    for number, launcher in ((signal.SIGUSR1, False), (signal.SIGTERM, True)):
        with started(tmp_path, trained_base, "--async-save") as process:
            row = 2 + (stopped_at[-1] + 1 if stopped_at else 0)
            wait_for(lambda row=row: lines(tmp_path) >= row, process, tmp_path)
            (process if launcher else workers(process)[1]).send_signal(number)
            process.wait(120)
        assert process.returncode == (1 if launcher else 0)  # torchrun's for a signal of its own, whatever the ranks'
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        stopped_at.append(summary["steps"])
        assert whole_checkpoints(tmp_path / "run" / "checkpoints")[-1] == summary["steps"]
    assert stopped_at[0] < stopped_at[1] < STEPS
    assert_hf_folder_is_of_a_checkpoint(tmp_path, trained_base)
    output = finished(train(2, tmp_path, trained_base, *flags(tmp_path, "--async-save")))
    assert "continuing" in output
    assert_equal(tmp_path, whole)


def test_leftovers_reach_another_number_of_replicas(whole, trained_base, tmp_path):
    """Continued by one rank where two had groups left over: the same groups, the same step."""
    checkpoints = whole / "run" / "checkpoints"
    held = [int(path.parent.name.removeprefix("iter_")) for path in checkpoints.glob("iter_*/leftovers.safetensors")]
    step = max(step for step in held if step < STEPS)  # of an empty list: nothing was left over, nothing is shown
    shutil.copytree(checkpoints / f"iter_{step:07d}", tmp_path / "from" / f"iter_{step:07d}")
    load = ("--num-steps", step + 1, "--load", tmp_path / "from")
    finished(train(1, tmp_path, trained_base, "--run-name", "one", *load))
    (found,) = (row for row in rows(tmp_path / "one") if row["step"] == step + 1)
    (expected,) = (row for row in rows(whole / "run") if row["step"] == step + 1)
    for name in ("reward/accuracy", "rollout/generated_samples", "rollout/dropped_groups", "response/length_mean"):
        assert found[name] == expected[name], name
    for update, reference in zip(found["updates"], expected["updates"], strict=True):
        for metric in ("actor/pg_loss", "actor/grad_norm", "fipo/active_fraction"):
            assert update[metric] == pytest.approx(reference[metric], rel=1e-4, abs=1e-5), metric

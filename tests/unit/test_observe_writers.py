"""Metrics on disk: JSONL and TensorBoard, also across a resume; phase times."""

import json
import math
import time

import pytest
import torch
from observe_runs import make_run, step_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fipo.observe.run_folder import RunFolder, read_jsonl
from megatron_fipo.observe.timers import PhaseTimer
from megatron_fipo.observe.writers import MetricWriter


def events(folder: RunFolder, series: str, key: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder.tensorboard / series))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(key)]


def test_each_step_is_one_line_and_readable_at_once(tmp_path):
    folder = RunFolder(tmp_path, "a")
    with MetricWriter(folder) as writer:
        writer.write({"step": 1, "actor/entropy": torch.tensor(0.25), "updates": [{"actor/grad_norm": 2}]})
        rows, damaged = read_jsonl(folder.metrics)  # before the writer is closed
    assert rows == [{"step": 1, "actor/entropy": 0.25, "updates": [{"actor/grad_norm": 2.0}]}]
    assert damaged == 0


def test_a_metric_that_is_no_number_is_refused_and_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path, "a")
    with MetricWriter(folder) as writer, pytest.raises((TypeError, ValueError)):
        writer.write({"step": 1, "x": None})
    assert folder.metrics.read_text() == ""


def test_not_a_number_is_null(tmp_path):
    folder = RunFolder(tmp_path, "a")
    with MetricWriter(folder) as writer:
        writer.write({"step": 1, "x": math.nan})
    assert json.loads(folder.metrics.read_text()) == {"step": 1, "x": None}


def test_tensorboard_has_steps_and_updates(tmp_path):
    folder = make_run(tmp_path, "a", steps=3)
    assert [step for step, _ in events(folder, "steps", "reward/mean")] == [1, 2, 3]
    assert events(folder, "steps", "eval/held-out/accuracy") == [(0, pytest.approx(0.234375))]
    updates = events(folder, "updates", "fipo/active_fraction")
    assert [step for step, _ in updates] == list(range(12))  # 4 updates in each of 3 steps
    assert updates[5][1] == pytest.approx(step_metrics(2, 3)["updates"][1]["fipo/active_fraction"])


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    """Killed after the metrics of step 3, whose checkpoint was not written; resumed after step 2."""
    whole, resumed = RunFolder(tmp_path, "whole"), RunFolder(tmp_path, "resumed")
    with MetricWriter(whole) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step_metrics(step))
    with MetricWriter(resumed) as writer:
        for step in (1, 2):
            writer.write(step_metrics(step))
        writer.write({**step_metrics(3), "reward/mean": -9.0})
    with resumed.metrics.open("a") as file:
        file.write('{"step": 4, "reward/me')
    resumed.truncate_after(2)
    with MetricWriter(resumed) as writer:
        for step in (3, 4):
            writer.write(step_metrics(step))
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    for series, key in (("steps", "reward/mean"), ("updates", "actor/grad_norm")):
        assert events(resumed, series, key) == events(whole, series, key)


def test_phases_are_disjoint_and_reset_every_step():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.03)
            with timer("reward"):
                time.sleep(0.05)
    times = timer.take()
    assert times["time/rollout"] >= 0.06 and times["time/reward"] >= 0.1
    assert times["time/rollout"] + times["time/reward"] <= times["time/step"]
    assert set(timer.take()) == {"time/step"}


def test_a_phase_that_raises_is_timed_and_closed():
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer("update"):
        raise KeyError
    with timer("eval"):
        pass
    assert set(timer.take()) == {"time/update", "time/eval", "time/step"}


def test_phases_wait_for_the_device():
    calls = []
    timer = PhaseTimer(lambda: calls.append(1))
    with timer("update"):
        assert len(calls) == 1
    assert len(calls) == 2

"""Training with a tool, as a user starts it: the example's calculator, on one rank, two replicas, and a split model."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_training import finished, rows, train

CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator"
TOOL = ("--rollout-function", "calculator:worked_sums", "--rollout-max-tokens", 40)


@pytest.fixture
def run(worked_base, tmp_path, monkeypatch):
    """run(name, ranks, flags...) -> its metrics.jsonl."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(CALCULATOR), os.environ.get("PYTHONPATH")])))

    def started(name: str, ranks: int, *flags: object) -> list[dict]:
        finished(train(ranks, tmp_path, worked_base, *TOOL, "--run-name", name, *flags))
        metrics = tmp_path / name / "metrics.jsonl"
        return rows(tmp_path / name) if metrics.exists() else []

    return started


def samples(folder: Path) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """What --rollout-only wrote in a step, by visit and place in its group."""
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for path in sorted(folder.glob("replica_*.safetensors")):
        columns = load_file(path)
        ends = columns["length"].cumsum()[:-1]
        parts = {name: np.split(columns[name], ends) for name in ("tokens", "response_mask", "rollout_logp")}
        for i, visit in enumerate(columns["group_id"].tolist()):
            place = sum(key[0] == visit for key in found)
            found[visit, place] = {name: part[i] for name, part in parts.items()} | {"reward": columns["reward"][i]}
    return found


def test_training_with_a_tool_is_the_same_in_every_layout(run, tmp_path):
    trained = run("trained", 1, "--num-steps", 2)
    for row in trained[1:]:
        assert row["mismatch/max"] < 1e-4 and row["reward/errors"] == 0
        first, *later = row["updates"]
        assert first["actor/ppo_kl"] == 0.0 and all(update["fipo/active_fraction"] > 0 for update in later)
    assert 0 < trained[2]["eval/heldout/accuracy"] < 1

    run("replicas", 2, "--num-steps", 3, "--rollout-only", tmp_path / "replicas")
    run("split", 2, "--num-steps", 3, "--rollout-only", tmp_path / "split", "--tensor-model-parallel-size", 2)
    carried, holes = [], 0
    for step in ("step_0000001", "step_0000002", "step_0000003"):
        found, expected = samples(tmp_path / "split" / step), samples(tmp_path / "replicas" / step)
        assert found.keys() == expected.keys() and len(found) == 64
        for key, sample in found.items():
            for name in ("tokens", "response_mask", "reward"):
                assert np.array_equal(sample[name], expected[key][name]), (step, key, name)
            assert np.allclose(sample["rollout_logp"], expected[key]["rollout_logp"], atol=1e-4)
            mask = sample["response_mask"]
            assert ((sample["rollout_logp"] == 0) == ~mask).all() and len(mask) <= 32 + 40
            holes += (~mask[mask.argmax() :]).sum()
        tables = [load_file(tmp_path / name / step / "table.safetensors") for name in ("split", "replicas")]
        assert all(np.array_equal(tables[0][name], tables[1][name]) for name in ("visits", "kept", "carried", "table"))
        carried.append(int(tables[0]["carried"]))
    assert holes > 100 and max(carried) > 0, "no tool or nothing left over: the test shows nothing"

    (replayed,) = run("replayed", 2, "--num-steps", 1, "--train-from-rollouts", tmp_path / "split")[1:]
    assert replayed["reward/accuracy"] == trained[1]["reward/accuracy"]
    for update, expected in zip(replayed["updates"], trained[1]["updates"], strict=True):
        for metric in ("actor/pg_loss", "actor/grad_norm", "actor/ppo_kl", "fipo/active_fraction"):
            assert update[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-5), metric

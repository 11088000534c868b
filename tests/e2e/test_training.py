"""Whole runs through torchrun, as a user starts them: learning, exact resume, replay on another number of replicas."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.checkpoint.state import whole_checkpoints

STEPS = 4
SMALL = """
    --preset quickstart --grpo-prompts-per-step 8 --grpo-group-size 8 --global-batch-size 16 --rollout-max-tokens 12
    --max-tokens-per-microbatch 128 --lr 1e-3 --lr-warmup-iters 0 --eval-interval 2 --seed 3
"""


def train(ranks: int, runs: Path, base: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run training to its end under torchrun; the output is checked by the caller."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command += ["-m", "megatron_fipo.train", *SMALL.split(), "--hf-model", base, "--runs-dir", runs]
    command += ["--prompt-data", base / "train.jsonl", "--eval-data", f"heldout:{base / 'heldout.jsonl'}:1", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)


def finished(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(("time", "perf/"))}


@pytest.fixture(scope="module")
def whole(trained_base, tmp_path_factory) -> tuple[Path, str]:
    """(folder, output) of an uninterrupted run of two replicas that saves every second step."""
    runs = tmp_path_factory.mktemp("whole")
    flags = ("--run-name", "run", "--num-steps", STEPS, "--save-interval", 2, "--keep-last", 5)
    return runs / "run", finished(train(2, runs, trained_base, *flags, "--save-hf", runs / "hf"))


def test_a_run_leaves_what_the_contract_names(whole):
    run, output = whole
    names = {path.name for path in run.iterdir()}
    expected = "metrics.jsonl summary.json report.html samples.jsonl arguments.json environment.json tensorboard"
    assert names >= {*expected.split(), "checkpoints"}
    assert [row["step"] for row in rows(run)] == [*range(STEPS + 1)]
    assert all(len(row["updates"]) == 4 for row in rows(run)[1:])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == STEPS and summary["seed"] == 3
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["greedy_after"] <= 1
    assert f"{STEPS}/{STEPS}" in output and "report" in output and "\x1b" not in output


def test_the_first_update_of_every_rollout_has_ratios_of_exactly_one(whole):
    for row in rows(whole[0])[1:]:
        first, *later = row["updates"]
        for name in ("neg_is_max", "pos_is_max", "pos_is_min", "influence_weights_min", "influence_weights_max"):
            assert first[f"actor/{name}"] == 1.0, name
        assert first["actor/ppo_kl"] == 0.0 and first["fipo/active_fraction"] == 0.0
        assert all(update["fipo/active_fraction"] > 0 for update in later)


def test_it_learns(trained_base, tmp_path):
    """Two prompts, 64 samples each: from guessing to knowing both answers. A wrong sign or mask would not."""
    two = tmp_path / "two.jsonl"
    two.write_text("".join((trained_base / "train.jsonl").read_text().splitlines(keepends=True)[:2]))
    flags = ("--run-name", "run", "--num-steps", 20, "--grpo-prompts-per-step", 2, "--grpo-group-size", 64)
    flags += ("--global-batch-size", 64, "--lr", 2e-3, "--no-rollout-dynamic-sampling", "--prompt-data", two)
    finished(train(2, tmp_path, trained_base, *flags, "--eval-data", f"both:{two}:64"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.2 and summary["accuracy_after"] > 0.6
    assert summary["active_fraction_mean"] > 0.05


def test_prompts_without_contrast_end_a_run_with_all_it_has(trained_base, tmp_path):
    flags = ("--run-name", "run", "--num-steps", 2, "--rollout-max-batches", 1, "--save-hf", tmp_path / "hf")
    process = train(1, tmp_path, trained_base, *flags)
    assert process.returncode != 0
    assert "megatron_fipo: only " in process.stderr and "groups hold both right and wrong" in process.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "out of contrast"
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "hf" / "model.safetensors").exists()


def test_finetune_takes_the_weights_alone(whole, trained_base, tmp_path):
    """In bf16 the optimizer trains fp32 copies of the weights, which must be those of the checkpoint too."""
    run, _ = whole
    flags = ("--run-name", "next", "--num-steps", 1, "--load", run / "checkpoints", "--finetune", "--bf16")
    flags += ("--lr", 1e-9, "--save-hf", tmp_path / "hf")
    finished(train(1, tmp_path, trained_base, *flags))
    assert [row["step"] for row in rows(tmp_path / "next")] == [0, 1]
    before, after = (load_file(folder / "hf" / "model.safetensors") for folder in (run.parent, tmp_path))
    for name, weight in before.items():
        torch.testing.assert_close(after[name].float(), weight, rtol=1e-2, atol=1e-3)


def test_engine_and_trainer_agree_on_log_probs(whole):
    assert all(row["mismatch/max"] < 1e-4 for row in rows(whole[0])[1:])


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, trained_base, tmp_path):
    run, _ = whole
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / f"iter_{STEPS:07d}" / "rl_state.json").unlink()  # killed before the last checkpoint was whole
    flags = ("--run-name", "run", "--num-steps", STEPS, "--load", checkpoints, "--save-hf", tmp_path / "hf")
    finished(train(2, tmp_path, trained_base, *flags, "--save-interval", 2, "--keep-last", 1))
    assert whole_checkpoints(str(checkpoints)) == [STEPS]
    assert [*map(without_clock, rows(tmp_path / "run"))] == [*map(without_clock, rows(run))]
    expected = load_file(run.parent / "hf" / "model.safetensors")
    resumed = load_file(tmp_path / "hf" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    moved = load_file(trained_base / "model.safetensors")
    assert any(not torch.equal(expected[name], moved[name]) for name in expected)


LAYOUTS = {"one": (1,), "data parallel": (2,), "tensor parallel": (2, "--tensor-model-parallel-size", 2)}


@pytest.mark.parametrize("normalization", ["token", "group"])
def test_every_layout_makes_the_same_updates(normalization, rollouts, trained_base, tmp_path):
    """Four updates on the same written rollout: loss, gradient norm and weights."""
    results = {}
    for name, (ranks, *layout) in LAYOUTS.items():
        flags = ("--run-name", name, "--num-steps", 1, "--train-from-rollouts", rollouts, *layout)
        flags += ("--loss-normalization", normalization, "--save-hf", tmp_path / f"{name} hf")
        finished(train(ranks, tmp_path, trained_base, *flags))
        updates = rows(tmp_path / name)[-1]["updates"]
        results[name] = updates, load_file(tmp_path / f"{name} hf" / "model.safetensors")
    expected_updates, expected_weights = results.pop("one")
    for updates, weights in results.values():
        for update, expected in zip(updates, expected_updates, strict=True):
            for metric in ("actor/pg_loss", "actor/grad_norm", "actor/ppo_kl", "fipo/active_fraction"):
                assert update[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-5), metric
        for weight, value in expected_weights.items():
            torch.testing.assert_close(weights[weight], value, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def rollouts(trained_base, tmp_path_factory) -> Path:
    """A rollout that two replicas wrote without training."""
    folder = tmp_path_factory.mktemp("rollouts")
    flags = ("--run-name", "writer", "--num-steps", 1, "--rollout-only", folder / "written")
    finished(train(2, folder, trained_base, *flags))
    return folder / "written"

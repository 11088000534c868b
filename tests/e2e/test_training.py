"""Whole runs through torchrun, as a user starts them: learning, replay on another number of replicas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def test_a_rollout_written_without_training_trains_like_the_run_that_makes_its_own(whole, trained_base, tmp_path):
    """Written by two replicas, trained on by one."""
    writer = ("--run-name", "writer", "--num-steps", 1, "--rollout-only", tmp_path / "written")
    finished(train(2, tmp_path, trained_base, *writer))
    reader = ("--run-name", "reader", "--num-steps", 1, "--train-from-rollouts", tmp_path / "written")
    finished(train(1, tmp_path, trained_base, *reader))
    replayed, made = rows(tmp_path / "reader")[1], rows(whole[0])[1]
    assert replayed["reward/accuracy"] == made["reward/accuracy"]
    for update, expected in zip(replayed["updates"], made["updates"], strict=True):
        for metric in ("actor/pg_loss", "actor/grad_norm", "actor/ppo_kl", "fipo/active_fraction"):
            assert update[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-5), metric

"""FIPO on SGLang servers, as a user starts it: two trainer ranks, two servers, real weight updates."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

LAYOUTS = {"data parallel": (), "tensor parallel": ("--tensor-model-parallel-size", 2)}
PLACES = LAYOUTS | {"on shared devices": ("--sglang-colocate",)}
FLAGS = """
    --preset quickstart --grpo-prompts-per-step 2 --grpo-group-size 64 --global-batch-size 64 --rollout-max-tokens 12
    --max-tokens-per-microbatch 512 --lr 2e-3 --lr-warmup-iters 0 --no-rollout-dynamic-sampling --eval-interval 100
"""
HELD_OUT = 64


def train(runs: Path, base: Path, name: str, steps: int, *flags: object) -> Path:
    """One run over two prompts, whose answers it learns; returns its folder."""
    two = runs / "two.jsonl"
    two.write_text("".join((base / "train.jsonl").read_text().splitlines(keepends=True)[:2]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "megatron_fipo.train", *FLAGS.split(), "--hf-model", base, "--runs-dir", runs, "--run-name", name]
    command += ["--prompt-data", two, "--eval-data", f"both:{two}:{HELD_OUT}", "--num-steps", steps, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-4000:]
    return runs / name


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def processes_of(run: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(run.parent) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", PLACES)
def test_it_trains_on_servers(layout, sglang_installed, trained_base, tmp_path):
    """It learns, the servers' log-probs are the trainer's before and after every update, and nothing is left."""
    flags = ("--rollout-engine", "sglang", "--sglang-servers", 2, "--check-weights", "--seed", 3, *PLACES[layout])
    run = train(tmp_path, trained_base, "run", 14, *flags)
    assert all(row["mismatch/max"] < 1e-4 for row in rows(run)[1:])
    assert all(row["rollout/servers_serving"] == 2 and row["rollout/answers_malformed"] == 0 for row in rows(run)[1:])
    summary = json.loads((run / "summary.json").read_text())
    # Servers draw at random: of the two prompts it learns one for sure in 14 steps, mostly both.
    assert summary["status"] == "finished" and summary["accuracy_before"] < 0.1 and summary["accuracy_after"] > 0.25
    assert len(list((run / "sglang").glob("*.log"))) == 2
    assert not processes_of(run)


def test_an_evaluation_on_servers_is_the_embedded_engines(sglang_installed, trained_base, tmp_path):
    metrics = {}
    for engine in ("embedded", "sglang"):
        command = [sys.executable, "-m", "megatron_fipo.evaluate", "--preset", "quickstart", "--hf-model", trained_base]
        command += ["--rollout-max-tokens", 12, "--eval-data", f"h:{trained_base / 'heldout.jsonl'}:8"]
        command += ["--rollout-engine", engine, *(("--sglang-servers", 1) if engine == "sglang" else ())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [*map(str, command), "--out", engine],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-4000:]
        metrics[engine] = json.loads((tmp_path / engine / "metrics.json").read_text())["sets"]["h"]
    assert metrics["embedded"]["greedy_accuracy"] == metrics["sglang"]["greedy_accuracy"]
    assert metrics["sglang"]["errors"] == 0 and metrics["sglang"]["responses"] == 512
    # Servers draw from random numbers of their own: two samples of one distribution.
    for key, tolerance in (("accuracy", 0.15), ("length_mean", 1.0)):
        assert metrics["sglang"][key] == pytest.approx(metrics["embedded"][key], abs=tolerance)
    assert not processes_of(tmp_path / "sglang")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_equals_the_embedded_engines(layout, sglang_installed, trained_base, tmp_path):
    """Over three seeds, within two standard errors."""
    accuracy = {}
    for engine in ("embedded", "sglang"):
        flags = ("--rollout-engine", engine, *(("--sglang-servers", 2) if engine == "sglang" else ()))
        runs = [
            train(tmp_path, trained_base, f"{engine} {seed}", 14, *flags, "--seed", seed, *LAYOUTS[layout])
            for seed in (1, 2, 3)
        ]
        accuracy[engine] = [json.loads((run / "summary.json").read_text())["accuracy_after"] for run in runs]
    means = {engine: sum(values) / 3 for engine, values in accuracy.items()}
    variances = [sum((a - means[engine]) ** 2 for a in values) / 2 / 3 for engine, values in accuracy.items()]
    sampling = sum(m * (1 - m) / (3 * 2 * HELD_OUT) for m in means.values())
    assert abs(means["embedded"] - means["sglang"]) <= 2 * math.sqrt(max(sum(variances), sampling))

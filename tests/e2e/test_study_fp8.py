"""The FP8 study from a written rollout to its table, in the environment of `make te-cpu`."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TE_PYTHON = Path(os.environ.get("TE_CPU", sys.prefix + "-te")) / "bin" / "python"


def run(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_study(trained_base, tmp_path):
    if not TE_PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("TransformerEngine's Python half is not installed: make te-cpu")
    updated = tmp_path / "updated"
    shutil.copytree(trained_base, updated)
    torch.manual_seed(0)
    tensors = load_file(trained_base / "model.safetensors")
    moved = {name: tensor * (1 + 0.01 * torch.randn_like(tensor)) for name, tensor in tensors.items()}
    save_file(moved, updated / "model.safetensors", metadata={"format": "pt"})
    run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m",
        "megatron_fipo.train", "--preset", "quickstart", "--hf-model", trained_base, "--prompt-data",
        trained_base / "train.jsonl", "--runs-dir", tmp_path / "runs", "--num-steps", 1, "--grpo-prompts-per-step", 8,
        "--grpo-group-size", 4, "--global-batch-size", 16, "--rollout-max-tokens", 12,
        "--no-rollout-dynamic-sampling", "--rollout-only", tmp_path / "rollouts",
    )  # fmt: skip
    printed = run(
        TE_PYTHON, ROOT / "tools" / "study_fp8.py", "--hf-model", trained_base, "--updated", updated, "--rollouts",
        tmp_path / "rollouts", "--json", tmp_path / "found.json", "--svg", tmp_path / "found.svg",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["recipes"]
    assert list(rows) == ["fp32", "tensorwise", "blockwise", "mxfp8"] and found["response_tokens"] > 32
    for name, row in rows.items():
        assert row["repeats"], "the same pass has the same bits, so that d is exactly 0 in the first update"
        assert row["first_update"]["same"] == 0 < row["first_update"]["elsewhere"]
        assert name in printed
    noise = {name: row["log_prob"]["std"] for name, row in rows.items()}
    assert all(0 < noise["fp32"] < noise[name] / 2 for name in rows if name != "fp32"), noise
    assert rows["tensorwise"]["log_prob"] != rows["blockwise"]["log_prob"], "every recipe computes its own"
    ElementTree.parse(tmp_path / "found.svg")

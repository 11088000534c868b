"""Conversion under torchrun, as a user starts it: written in one layout, checked in another, trained in a third."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


def run(ranks: int, *command: object) -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *command]
    process = subprocess.run([*map(str, launch)], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_layouts_interchange(hf_model, tmp_path):
    source, _ = hf_model("qwen3_moe", tied=False, num_hidden_layers=4)
    run(
        4, TOOL, "import", "--hf", source, "--out", tmp_path / "megatron",
        "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
    )  # fmt: skip
    run(2, TOOL, "export", "--megatron", tmp_path / "megatron", "--out", tmp_path / "hf")
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert expected.keys() == found.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    printed = run(
        4, TOOL, "verify", "--hf", tmp_path / "hf", "--megatron", tmp_path / "megatron", "--json", tmp_path / "json",
        "--expert-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--num-layers-per-virtual-pipeline-stage", 1,
    )  # fmt: skip
    assert "equal" in printed and "worst layer" in printed
    result = json.loads((tmp_path / "json").read_text())
    assert result["equal"] and result["logit_error"] < 1e-5 and len(result["errors"]) == 6
    assert max(result["errors"].values()) > 0, "every stage has computed"


def test_training_starts_from_an_imported_checkpoint_and_its_own_is_exported(trained_base, tmp_path):
    """The imported weights are not those of --hf-model, so that only --load can have brought them."""
    other = tmp_path / "other"
    shutil.copytree(trained_base, other)
    expected = {name: tensor * 1.5 for name, tensor in load_file(trained_base / "model.safetensors").items()}
    save_file(expected, other / "model.safetensors", metadata={"format": "pt"})
    run(1, TOOL, "import", "--hf", other, "--out", tmp_path / "megatron")
    flags = """
        --preset quickstart --grpo-prompts-per-step 4 --grpo-group-size 4 --global-batch-size 8 --num-steps 1
        --rollout-max-tokens 12 --max-tokens-per-microbatch 128 --no-rollout-dynamic-sampling --save-interval 1
        --lr 0 --min-lr 0 --weight-decay 0
    """
    run(
        2, "-m", "megatron_fipo.train", *flags.split(), "--hf-model", trained_base, "--runs-dir", tmp_path / "runs",
        "--prompt-data", trained_base / "train.jsonl", "--load", tmp_path / "megatron", "--finetune",
    )  # fmt: skip
    checkpoints = next((tmp_path / "runs").glob("*/checkpoints"))
    run(1, TOOL, "export", "--megatron", checkpoints, "--hf", trained_base, "--out", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items()), "a step of rate 0 keeps the imported weights"

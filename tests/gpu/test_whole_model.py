"""A step of a whole model on a GPU beside the same step on the CPU. Needs megatron-core and transformers besides."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny_models import write_hf_model
from written_rollouts import GROUP_SIZE, GROUPS, written_rollout

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
for package in ("megatron.core", "transformers"):
    pytest.importorskip(package)

FLAGS = f"""
    --preset quickstart --num-steps 1 --grpo-prompts-per-step {GROUPS} --grpo-group-size {GROUP_SIZE}
    --no-rollout-dynamic-sampling --global-batch-size {2 * GROUP_SIZE} --rollout-max-tokens 60 --max-prompt-tokens 20
    --max-tokens-per-microbatch 96 --lr 1e-3 --adam-eps 1e-6 --lr-warmup-iters 0 --fipo-half-life 8 --seed 1
    --bf16 --transformer-impl local
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "model").mkdir()
    write_hf_model(folder / "model", "qwen3", tied=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # writing ends with a barrier
    written_rollout(folder / "rollouts", 1)
    dist.destroy_process_group()
    return folder


def train(folder, device: str) -> dict:
    """The step's metrics; with device "cpu" no GPU is seen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "megatron_fipo.train"]
    paths = ["--hf-model", folder / "model", "--train-from-rollouts", folder / "rollouts"]
    paths += ["--runs-dir", folder, "--run-name", device]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    process = subprocess.run(
        [*map(str, command + paths), *FLAGS.split()],
        env=os.environ | hidden, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((folder / device / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_step_is_that_of_the_cpu_up_to_the_rounding_of_bf16(folder):
    on_gpu, on_cpu = train(folder, "gpu"), train(folder, "cpu")
    first, *later = on_gpu["updates"]
    assert first["fipo/active_fraction"] == 0, "old log-probs are not those of the first update"
    assert all(update["fipo/active_fraction"] > 0.2 for update in later)
    assert on_gpu["actor/entropy"] == pytest.approx(on_cpu["actor/entropy"], rel=1e-2)
    for update, expected in zip(on_gpu["updates"], on_cpu["updates"], strict=True):
        for key in ("actor/pg_loss", "actor/grad_norm", "actor/influence_weights_mean"):
            assert update[key] == pytest.approx(expected[key], rel=0.05, abs=0.01), key

"""A whole model on a GPU beside the same model on the CPU, with Megatron's local layers and with TransformerEngine's:
a training step, generation, and log-probs. Needs megatron-core and transformers besides.

The CPU's side sees no GPU and has local layers; where no GPU is, both sides are the CPU's.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

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
    --max-tokens-per-microbatch 96 --lr 1e-3 --adam-eps 1e-6 --lr-warmup-iters 0 --fipo-half-life 8 --seed 1 --bf16
"""
# Four experts for a token: the sum of two does not depend on their order, which is what may differ between passes.
FAMILIES = {"qwen3": {}, "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 4}}
# A token whose router is undecided goes to other experts.
MOST_OFF = {"qwen3": 0.1, "qwen3_moe": 0.5}
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    for family, settings in FAMILIES.items():
        (folder / family).mkdir()
        write_hf_model(folder / family, family, tied=False, **settings)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # writing ends with a barrier
    written_rollout(folder / "rollouts", 1)
    dist.destroy_process_group()
    return folder


@pytest.fixture(params=["local", "transformer_engine"])
def layers(request):
    if request.param == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    return request.param


def run(folder: Path, device: str, *command: object) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    # Containers let cuBLAS round the factors of fp32 products to 10 bits.
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"} | hidden
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr[-4000:]


@functools.cache
def train(folder: Path, device: str, family: str, layers: str) -> dict:
    """The step's metrics."""
    name = f"{device}-{family}-{layers}"
    run(
        folder, device, "-m", "torch.distributed.run", "--standalone", "-m", "megatron_fipo.train", *FLAGS.split(),
        "--hf-model", family, "--train-from-rollouts", "rollouts", "--runs-dir", "runs", "--run-name", name,
        "--transformer-impl", layers,
    )  # fmt: skip
    return json.loads((folder / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])


@functools.cache
def compute(folder: Path, device: str, family: str, layers: str) -> dict:
    """What the worker computes; the GPU's also has log-probs of the CPU's tokens."""
    out = folder / f"{device}-{family}-{layers}.pt"
    reference = []
    if device == "gpu":
        compute(folder, "cpu", family, "local")
        reference = [folder / f"cpu-{family}-local.pt"]
    run(folder, device, TESTS / "gpu" / "whole_model_worker.py", family, layers, out, *reference)
    return torch.load(out)


def both(folder: Path, family: str, layers: str, dtype: torch.dtype) -> tuple[dict, dict]:
    cpu = compute(folder, "cpu", family, "local")[str(dtype)]
    return compute(folder, "gpu", family, layers)[str(dtype)], cpu


def is_exact(family: str, layers: str) -> bool:
    """Whether passes repeat bit for bit: Megatron's own kernels add the experts' outputs up in any order."""
    return family == "qwen3" or layers == "transformer_engine"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_cpu_up_to_the_rounding_of_bf16(folder, family, layers):
    on_gpu, on_cpu = train(folder, "gpu", family, layers), train(folder, "cpu", family, "local")
    first, *later = on_gpu["updates"]
    if is_exact(family, layers):
        assert first["fipo/active_fraction"] == 0 == first["actor/ppo_kl"], "old log-probs are not the first update's"
    assert all(update["fipo/active_fraction"] > 0.1 for update in later)
    assert on_gpu["actor/entropy"] == pytest.approx(on_cpu["actor/entropy"], rel=1e-2)
    for update, expected in zip(on_gpu["updates"], on_cpu["updates"], strict=True):
        for key in ("actor/pg_loss", "actor/grad_norm", "actor/influence_weights_mean"):
            assert update[key] == pytest.approx(expected[key], rel=0.05, abs=0.01), key


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_fp32_is_that_of_the_cpu(folder, family, layers):
    on_gpu, on_cpu = both(folder, family, layers, torch.float32)
    assert on_gpu["tokens"] == on_cpu["tokens"]
    assert len({token for tokens in on_cpu["tokens"] for token in tokens}) > 10
    torch.testing.assert_close(on_gpu["engine"], on_cpu["engine"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_in_bf16_are_those_of_the_cpu(folder, family, layers):
    on_gpu, on_cpu = both(folder, family, layers, torch.bfloat16)
    for name, found, expected in (
        ("the trainer's, of the CPU's tokens", on_gpu["reference"], on_cpu["own"]),
        ("the engine's, of its own tokens", on_gpu["engine"], on_gpu["own"]),
    ):
        off = (found - expected).abs()
        assert off.mean() < 0.02 and off.max() < MOST_OFF[family], (name, off.mean(), off.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_with_and_without_gradient_are_bitwise_equal(folder, family, layers):
    if not is_exact(family, layers):
        pytest.skip("without TransformerEngine's permutation the sum over experts is in no fixed order")
    assert compute(folder, "gpu", family, layers)[str(torch.bfloat16)]["same"]

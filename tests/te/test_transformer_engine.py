"""TransformerEngine's real layers, in BF16 and FP8, on a CPU: one launch of the te-cpu environment runs all cases."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "parallel"))
from test_layouts import written_rollout  # noqa: E402

PYTHON = Path(os.environ.get("TE_CPU", sys.prefix + "-te")) / "bin" / "python"
CASES = 55
pytestmark = pytest.mark.timeout(600)


def te_environment() -> dict[str, str]:
    """Skips the test without the environment, except in CI."""
    if not PYTHON.exists():
        if os.environ.get("CI"):
            pytest.fail("no TransformerEngine: make te-cpu (CI must not skip these tests)")
        pytest.skip("no TransformerEngine: make te-cpu")
    folders = (TESTS.parent, TESTS, *(TESTS / name for name in ("unit", "parallel", "te")))
    path = os.pathsep.join(map(str, folders))
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def folder(megatron, hf_model, trained_base, tmp_path_factory) -> Path:
    """The models and the rollout that the cases use, and what they have written."""
    environment, folder = te_environment(), tmp_path_factory.mktemp("te")
    width = dict(hidden_size=128, intermediate_size=256, initializer_range=0.05, dtype=torch.bfloat16)
    for family, more in (("qwen2", {}), ("qwen3", {}), ("qwen3_moe", {"moe_intermediate_size": 64})):
        (folder / family).symlink_to(hf_model(family, tied=False, **width, **more)[0])
    (folder / "base").symlink_to(trained_base)
    for step in (1, 2):
        written_rollout(folder / "rollouts", step)
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [TESTS / "te" / "worker.py", folder]
    process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=540)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    held = re.findall("^holds: (.+)$", process.stdout, re.M)
    assert len(held) == len(set(held)) == CASES, process.stdout
    return folder


def test_every_case_holds(folder):
    pass


@pytest.mark.parametrize("name", ["bf16", "blockwise"])
def test_its_checkpoints_are_read_without_it(folder, name, tmp_path):
    """The converter knows one spec only, and no TransformerEngine: the weights of a run's end, bit by bit."""
    command = [sys.executable, "tools/convert_checkpoint.py", "export"]
    command += ["--megatron", folder / name / "checkpoints", "--out", tmp_path / "hf", "--hf", folder / "qwen3"]
    process = subprocess.run([*map(str, command)], cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-3000:]
    exported, expected = (load_file(path / "hf" / "model.safetensors") for path in (tmp_path, folder / name))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)


def test_the_doctor_says_what_it_is_used_for(tmp_path):
    environment, out = te_environment(), tmp_path / "doctor.json"
    doctor = ["megatron_fipo.doctor", "--json", str(out)]
    for gpu, presets in (
        ("hopper", "--fp8-preset hopper"),
        ("blackwell", "--fp8-preset hopper, --fp8-preset blackwell"),
    ):
        command = [str(PYTHON), "-m", "megatron_fipo.compat.te_cpu", "--gpu", gpu, *doctor]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stdout + process.stderr[-3000:]
        checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
        assert "emulated" in checks["transformer_engine"]["value"]
        assert checks["optimizer"]["value"] == "transformer_engine: FusedAdam"
        for name in ("layers", "norms"):
            assert checks[name]["value"] == "TransformerEngine", name
        assert checks["gradient clipping"]["value"] == "transformer_engine"
        assert checks["attention"]["value"] == "torch, packed sequences"
        assert checks["FP8 training"]["value"] == presets
    # Without the stand-in it is half a TransformerEngine, which is said.
    process = subprocess.run([str(PYTHON), "-m", *doctor], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and "half installed" in process.stdout, process.stdout


def test_the_stand_in_is_for_processes_that_ask_for_it():
    environment = te_environment()

    def refusal(code: str) -> str:
        process = subprocess.run(
            [str(PYTHON), "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode, process.stdout
        return process.stderr.splitlines()[-1]

    install = "from megatron_fipo.compat import te_cpu; te_cpu.install()"
    assert "imported already" in refusal(f"import megatron.core; {install}")
    present = "import torch; torch.cuda.is_available = lambda: True; "
    assert "has a GPU" in refusal(present + install)
    assert (
        "make te-cpu"
        in subprocess.run(
            [sys.executable, "-c", install], env=environment, capture_output=True, text=True, timeout=300
        ).stderr
    )

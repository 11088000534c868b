"""Post-training quantisation; the cases run in an environment of its own, which `make modelopt` makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.prefix + "-modelopt") / "bin" / "python"
TOOL = ROOT / "tools" / "quantize_checkpoint.py"


def test_quantised_checkpoints(tmp_path):
    if not PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("ModelOpt is not installed: make modelopt")
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "cases"]
    process = subprocess.run(
        [*command, ROOT / "tests" / "modelopt" / "cases.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


def test_without_modelopt_the_tool_says_what_to_do(tmp_path):
    command = [sys.executable, TOOL, "--hf", tmp_path, "--prompts", "x", "--format", "fp8", "--out", tmp_path / "out"]
    process = subprocess.run(
        [*map(str, command)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2 and "make modelopt" in process.stderr and process.stderr.count("\n") == 1

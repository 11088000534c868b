"""Our weight map against Megatron-Bridge's; the cases run in an environment of its own, which `make bridge` makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.prefix + "-bridge") / "bin" / "python"


def test_agrees_with_megatron_bridge(tmp_path):
    if not PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("Megatron-Bridge is not installed: make bridge")
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "cases"]
    process = subprocess.run(
        [*command, ROOT / "tests" / "bridge" / "cases.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]


def test_without_it_the_flag_says_what_to_do(convert, hf_model, tmp_path, capsys):
    source, _ = hf_model("qwen3", tied=True)
    capsys.readouterr()
    argv = ["import", "--hf", source, "--out", tmp_path / "out", "--bridge", "megatron-bridge"]
    assert convert.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert "make bridge" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

"""Post-training quantisation; the cases run in an environment of its own, which `make modelopt` makes."""

import os
import subprocess
import sys

from side_environment import ROOT, run_cases

TOOL = ROOT / "tools" / "quantize_checkpoint.py"


def test_quantised_checkpoints(tmp_path):
    run_cases("modelopt", "modelopt/cases.py", tmp_path)


def test_without_modelopt_the_tool_says_what_to_do(tmp_path):
    command = [sys.executable, TOOL, "--hf", tmp_path, "--prompts", "x", "--format", "fp8", "--out", tmp_path / "out"]
    process = subprocess.run(
        [*map(str, command)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2 and "make modelopt" in process.stderr and process.stderr.count("\n") == 1

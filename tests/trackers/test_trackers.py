"""The trackers' tests with the real clients of W&B and MLflow, in an environment that `make trackers` makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.prefix + "-trackers") / "bin" / "python"


def test_real_clients(tmp_path):
    if not PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("W&B and MLflow are not installed: make trackers")
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "cases"]
    process = subprocess.run(
        [*command, ROOT / "tests" / "unit" / "test_observe_trackers.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout and "skipped" not in process.stdout

"""Cases that run in an environment beside this one, which `make NAME` makes at $(VENV)-NAME."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def side_python(name: str) -> Path:
    """The environment's interpreter. Without one the test that asks is skipped, and fails in CI."""
    python = Path(f"{sys.prefix}-{name}") / "bin" / "python"
    if not python.exists() and not os.environ.get("CI"):
        pytest.skip(f"its packages are not installed: make {name}")
    return python


def run_cases(name: str, cases: str, tmp_path: Path) -> str:
    """Run a file of tests there, which must all pass; returns what pytest prints."""
    command = [side_python(name), "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "cases"]
    process = subprocess.run(
        [*command, ROOT / "tests" / cases],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    return process.stdout

"""The quickstart as a user runs it, base model included, for three seeds: its curve must rise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_curve_rises(seed, tmp_path):
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": binaries, "SEED": str(seed), "RUN_NAME": "quickstart-test"}
    flags = ("--runs-dir", tmp_path, "--save-hf", tmp_path / "hf")
    command = [ROOT / "examples/quickstart/run.sh", *flags]
    subprocess.run([*map(str, command)], env=environment, check=True, timeout=600)
    summary = json.loads((tmp_path / "quickstart-test" / "summary.json").read_text())
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.2
    assert summary["active_fraction_mean"] >= 0.2

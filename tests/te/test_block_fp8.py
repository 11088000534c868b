"""Weights that the rollout engine gets are those that TransformerEngine's linear layers compute with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("TE_CPU", sys.prefix + "-te")) / "bin" / "python"


@pytest.mark.parametrize(("fp32_scales", "scales"), [("0", "power of two"), ("1", "fp32")])
def test_bytes_are_transformer_engines(fp32_scales, scales):
    if not PYTHON.exists():
        if os.environ.get("CI"):
            pytest.fail("no TransformerEngine: make te-cpu (CI must not skip this test)")
        pytest.skip("no TransformerEngine: make te-cpu")
    environment = os.environ | {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": fp32_scales, "PYTHONPATH": str(TESTS.parent)}
    command = [str(PYTHON), str(TESTS / "te" / "block_fp8_cases.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.startswith(scales)

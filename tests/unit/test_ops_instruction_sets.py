"""Every instruction set that this CPU offers passes the oracle's tests; what is chosen and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fipo import _host

UNIT = Path(__file__).parent
ORACLE_TESTS = ["test_loss_oracle.py", "test_loss_golden.py", "test_loss_statistics.py", "test_ops_kernels.py"]
ASCENDING = ["portable", "avx2", "avx512"]
CAPABILITY = _host.cpu_capability()
OFFERED = [name for name in CAPABILITY["built"] if ASCENDING.index(name) <= ASCENDING.index(CAPABILITY["offered"])]


def run(value, *arguments):
    env = os.environ | {"MEGATRON_FIPO_CPU": value, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=UNIT.parents[1])


@pytest.mark.parametrize("name", [name for name in OFFERED if name != CAPABILITY["selected"]])
def test_the_oracle_holds_for(name):
    """The selected one runs these tests as part of the suite."""
    result = run(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(UNIT / file) for file in ORACLE_TESTS))
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout or "[100%]" in result.stdout


def test_selection_is_the_best_or_as_asked():
    code = "from megatron_fipo import _host; print(_host.cpu_capability()['selected'])"
    for name in OFFERED:
        assert run(name, "-c", code).stdout.strip() == name
    assert run("", "-c", code).stdout.strip() == OFFERED[-1]


def test_an_unknown_instruction_set_is_refused_by_name_with_those_on_offer():
    code = (
        "import torch; from megatron_fipo.ops import discounted_scan as s; s(torch.ones(3), torch.tensor([0, 3]), 0.5)"
    )
    refused = run("mmx", "-c", code)
    assert refused.returncode != 0
    assert f"MEGATRON_FIPO_CPU=mmx cannot be used here: set it to one of: {', '.join(OFFERED)}" in refused.stderr


def test_instruction_sets_agree(tmp_path):
    """The same pack, each set in its own process: only rounding differs."""
    code = """
import sys, torch
from megatron_fipo.loss import FipoConfig, fipo_loss
g = torch.Generator().manual_seed(0)
cu = torch.tensor([0, 7, 5000, 5001, 45000])
old = -torch.rand(45000, generator=g)
logp = (old + 0.1 * torch.randn(45000, generator=g)).requires_grad_()
mask = torch.rand(45000, generator=g) < 0.95
out = fipo_loss(logp, old, torch.tensor([1.0, -1.0, 0.5, -0.3]), mask, cu, FipoConfig(weight_low=0.5, weight_high=2.0))
out.loss.backward()
torch.save([out.loss.detach(), out.weights_T, logp.grad, out.token_statistics_K], sys.argv[1])
"""
    results = []
    for name in OFFERED:
        done = run(name, "-c", code, str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / name))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)

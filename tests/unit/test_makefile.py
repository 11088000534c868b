"""`make sglang` with and without a GPU and an SGLang: a python that knows just the modules that the rule asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_sglang(tmp_path):
    def run(*, gpu: bool, installed: bool) -> subprocess.CompletedProcess[str]:
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        (venv / "bin" / "python").chmod(0o755)
        for stamp in (".installed", ".built"):
            (venv / stamp).touch()
        modules = tmp_path / "modules"
        modules.mkdir()
        (modules / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")
        (modules / "pip.py").write_text("import sys\nprint(*sys.argv[1:])\n")
        if installed:
            (modules / "sglang.py").touch()
        return subprocess.run(
            ["make", "sglang", f"VENV={venv}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(modules)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("installed", [True, False])
def test_a_cpu_gets_the_set_for_a_cpu(make_sglang, tmp_path, installed):
    done = make_sglang(gpu=False, installed=installed)
    assert done.returncode == 0 and "requirements/sglang.txt" in done.stdout, done.stderr
    assert (tmp_path / "venv" / ".sglang").exists()


def test_beside_a_gpu_the_sglang_that_is_there_stays(make_sglang, tmp_path):
    done = make_sglang(gpu=True, installed=True)
    assert (
        done.returncode == 0 and "using the SGLang that is installed" in done.stdout and "install -" not in done.stdout
    )
    assert (tmp_path / "venv" / ".sglang").exists()


def test_beside_a_gpu_without_one_it_says_what_to_do(make_sglang, tmp_path):
    done = make_sglang(gpu=True, installed=False)
    assert (
        done.returncode != 0 and "use a container that has SGLang" in done.stderr and "requirements" not in done.stdout
    )
    assert not (tmp_path / "venv" / ".sglang").exists()

"""The doctor in real environments: this one, a bare Python, half a TransformerEngine, a Megatron that has changed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import doctor

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    folders = [str(folder) for folder in (path, ROOT) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200)


def test_this_environment_can_train(tmp_path):
    import torch

    out = tmp_path / "doctor.json"
    result = run_doctor("-m", "megatron_fipo.doctor", "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Training can run." in result.stdout and "\x1b" not in result.stdout
    found = json.loads(out.read_text())
    assert found["can_train"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["torch"]["value"] == torch.__version__.partition("+")[0]
    assert checks["megatron-core"]["status"] == checks["compiled operators"]["status"] == "ok"
    if not torch.cuda.is_available():
        assert checks["optimizer"]["value"] == "torch: AdamW" and checks["gradient clipping"]["value"] == "megatron"
        assert checks["layers"]["value"] == "Megatron's local layers" and checks["norms"]["value"] == "torch"
        assert checks["weight gradients"]["value"] == "added up after the GEMM"
        assert checks["FP8 training"]["status"] == "absent"
        assert checks["device"]["value"].startswith("CPU, gloo")
        assert re.search(r"\d+ patched symbols are as expected", checks["symbols"]["value"])


@pytest.mark.parametrize(("version", "status"), [("0.5.10", "warning"), ("0.5.23", "ok"), (None, "absent")])
def test_an_sglang_with_published_holes_is_named(version, status, monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_version", lambda package: version)
    monkeypatch.setattr(doctor, "find_spec", lambda name: True)
    check = doctor._sglang(torch)
    assert check.status == status and ("make sglang" in check.fix or status == "ok")


def test_a_bare_python_cannot(tmp_path):
    result = run_doctor("-S", "-m", "megatron_fipo.doctor")  # -S: no site-packages
    assert result.returncode == 1, result.stderr
    assert re.search(r"problem +torch .*No module named 'torch'\n +-> make env", result.stdout)
    assert "Training cannot run" in result.stdout


def test_half_a_transformer_engine_is_named(tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("__version__ = '2.20.2'\n")
    result = run_doctor("-m", "megatron_fipo.doctor", path=tmp_path)
    assert result.returncode == 1, result.stderr
    assert re.search(r"problem +transformer_engine .*half installed: .*transformer_engine\.pytorch", result.stdout)
    assert "-> take transformer_engine off PYTHONPATH" in result.stdout


@pytest.mark.parametrize(
    ("module", "symbol"),
    [
        (
            "megatron.core.optimizer.distrib_optimizer",
            "DistributedOptimizer._set_main_param_and_optimizer_states",
        ),  # patched
        ("megatron.training.argument_utils", "core_transformer_config_from_args"),  # imported
    ],
)
def test_a_megatron_without_a_symbol_is_named(module, symbol):
    code = (
        f"import sys, {module} as m\ndel m.{symbol}\n"
        "from megatron_fipo.doctor import main\nif __name__ == '__main__': sys.exit(main([]))"
    )
    result = run_doctor("-c", code)
    assert result.returncode == 1, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "problem" in line)
    assert symbol.rpartition(".")[2] in line


def test_versions_that_differ_from_the_pins_are_named(tmp_path, monkeypatch):
    for name, version in (("megatron_core", "0.18.0"), ("torch", "2.9.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    checks = {check.name: check for check in doctor._installed()}
    assert checks["megatron-core"].status == checks["torch"].status == "warning"
    assert checks["megatron-core"].value == "0.18.0, tested with ==0.19.2"
    assert checks["megatron-core"].fix == "pip install 'megatron-core==0.19.2'"
    assert checks["numpy"].status == "ok"


def test_a_missing_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_declared_requirements", lambda: ["no-such-package-here>=1", "numpy"])
    (missing,) = (check for check in doctor._installed() if check.status == "problem")
    assert (missing.name, missing.value, missing.fix) == ("no-such-package-here", "not installed", "make env")

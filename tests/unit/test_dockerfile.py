"""The image: linted, given what it needs, and its torch left alone by everything that is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
IMAGE_TORCH = "2.12.0a0+nv26.05"  # what nvcr.io/nvidia/pytorch:26.05-py3 calls its torch, but for the commit


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "requirements/dev.txt brings it: make env"
    checked = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_pins_that_the_image_takes_are_there():
    (name,) = re.findall(r"grep '\^(\w+)==' requirements/base.txt", DOCKERFILE)
    pins = (ROOT / "requirements" / "base.txt").read_text().splitlines()
    (pin,) = (Requirement(line) for line in pins if line.startswith(f"{name}=="))
    (wanted,) = (r for r in map(Requirement, DEPENDENCIES) if r.name == name)
    assert wanted.specifier.contains(next(iter(pin.specifier)).version)


def test_what_is_copied_is_there_and_not_ignored():
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_s_torch_is_new_enough():
    """A pre-release counts as older than its release, which excludes the images with 2.10.0a0."""
    (torch,) = (r for r in map(Requirement, DEPENDENCIES) if r.name == "torch")
    assert torch.specifier.contains(Version(IMAGE_TORCH), prereleases=True)
    assert not torch.specifier.contains(Version("2.10.0a0+nv25.12"), prereleases=True)
    assert "pytorch:26.05-py3" in DOCKERFILE


@pytest.mark.long
def test_nothing_that_is_installed_replaces_torch(tmp_path):
    """pip against the package index, in an environment that has the image's torch by name and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True)
    (site,) = (tmp_path / "image").glob("lib/python*/site-packages")
    (site / f"torch-{IMAGE_TORCH}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {IMAGE_TORCH}\n"
    (site / f"torch-{IMAGE_TORCH}.dist-info" / "METADATA").write_text(metadata)
    (tmp_path / "keep.txt").write_text(f"torch=={IMAGE_TORCH}\n")
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "image" / "bin" / "python", "--quiet"]
    pip += ["install", "--dry-run", "--report", tmp_path / "report.json", "--constraint", tmp_path / "keep.txt"]
    resolved = subprocess.run([*pip, *DEPENDENCIES], capture_output=True, text=True, timeout=600)
    assert resolved.returncode == 0, resolved.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    names = {item["metadata"]["name"].lower() for item in report["install"]}
    assert {"megatron-core", "transformers", "reasoning_gym"} <= names
    assert not {name for name in names if name.startswith(("torch", "nvidia-", "triton"))}

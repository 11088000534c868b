"""Software and hardware that a result came from."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "megatron-fipo",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "sglang",
    "reasoning-gym",
    "numpy",
)


def describe_environment() -> dict[str, Any]:
    """Versions, processor, accelerators and the commit of this checkout, as plain JSON values (None: not there)."""
    import torch  # here, because doctor uses this module where torch may be missing

    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": git_commit(),
    }


def installed_version(distribution: str) -> str | None:
    """Version from the installed metadata, without importing the package; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's marketing name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines: Iterable[str] = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with "-dirty" after it if files differ.

    None for an installed copy: its folder may lie inside another project's repository, whose commit says nothing here.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except FileNotFoundError:  # a machine without git
        return None
    return result.stdout.strip() or None

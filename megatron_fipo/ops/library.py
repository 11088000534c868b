"""Loads the operator library once; `operators` is its namespace under torch.ops."""

from pathlib import Path

import torch

from megatron_fipo._host import build_info

_PACKAGE = Path(__file__).resolve().parent.parent


def _load() -> None:
    libraries = sorted(_PACKAGE.glob("_ops*.so"))
    if not libraries:
        raise ImportError(f"the compiled operators are missing: run `make env` (looked for {_PACKAGE}/_ops*.so)")
    torch.ops.load_library(str(libraries[0]))


_load()
operators = torch.ops.megatron_fipo


def has_kernels_for(device_type: str) -> bool:
    """Whether this build holds compiled kernels for tensors on "cpu" or "cuda"."""
    return device_type == "cpu" or (device_type == "cuda" and bool(build_info()["cuda"]))

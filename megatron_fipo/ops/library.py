"""Loads the operator library once; `operators` is its namespace under torch.ops."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def _load() -> None:
    libraries = sorted(_PACKAGE.glob("_ops*.so"))
    if not libraries:
        raise ImportError(f"the compiled operators are missing: run `make env` (looked for {_PACKAGE}/_ops*.so)")
    torch.ops.load_library(str(libraries[0]))


_load()
operators = torch.ops.megatron_fipo

"""What a Hugging Face folder holds beside its weights. Imports no Megatron, for tools that run without it."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?")


def copy_side_files(
    source: Path, folder: Path, dtype: torch.dtype | None = None, quantization: Mapping[str, Any] | None = None
) -> None:
    """Copy config, tokenizer, generation settings, chat template - all but weights - into a new folder.

    Args:
        dtype: written into config.json; None: the configuration stays as it is.
        quantization: the quantization_config of config.json.
    """
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not _WEIGHTS.fullmatch(file.name):
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    changed: dict[str, Any] = {"quantization_config": dict(quantization)} if quantization else {}
    named = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and named != str(dtype).removeprefix("torch."):
        changed["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    if changed:
        (folder / "config.json").write_text(json.dumps(config | changed, indent=2) + "\n")

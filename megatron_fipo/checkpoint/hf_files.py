"""Hugging Face folders on disk: tensors by name, and their check against a model's weight map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_fipo.checkpoint.hf_map import WeightMap
from megatron_fipo.errors import UserError
from megatron_fipo.model.hf_config import weight_files

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a folder or a stream."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class HFWeights:
    """The tensors of an HF folder by name, read when asked for."""

    def __init__(self, hf_dir: str | Path) -> None:
        """Raises UserError: a file is missing or damaged, or a tensor is in two files."""
        self.folder = Path(hf_dir)
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in weight_files(hf_dir):
            handle = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name in self._files:
                    raise UserError(f"{path} repeats {name} of {self._files[name][0].name}: download the model again.")
                self._files[name] = (path, handle)

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """None: a dtype that is no plain floating-point weight, such as FP8."""
        return DTYPES.get(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        return self._files[name][1].get_slice(name)

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError: the tensor has NaNs or infinities."""
        return self.read(name, ())

    def read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """That part of the tensor; the rest is neither read nor checked. Raises UserError: NaNs or infinities in it."""
        path, _ = self._files[name]
        tensor = self._slice(name)[where].contiguous()  # a view of the file, of columns slow to go through twice
        if not is_finite(tensor):
            raise UserError(f"{path} has NaN or infinite values in {name}: download the model again.")
        return tensor

    def check(self, weight_map: WeightMap) -> None:
        """Raises UserError: tensors are missing, superfluous, misshapen or quantised."""
        wanted, present = dict.fromkeys(weight_map.hf_names()), self.names()
        # Buffers of old exports, and the head that some exports of tied models repeat.
        ignored = {name for name in present if name.endswith("rotary_emb.inv_freq")}
        if weight_map.tied:
            ignored.add("lm_head.weight")
        if missing := [name for name in wanted if name not in present]:
            raise UserError(f"{self.folder} lacks {some(missing)}: download the model's safetensors files again.")
        if extra := sorted(present - wanted.keys() - ignored):
            raise UserError(
                f"{self.folder} has {some(extra)}, which its config.json does not account for: check config.json."
            )
        for name in wanted:
            if self.shape(name) != weight_map.hf_shape(name):
                raise UserError(
                    f"{self.folder} has {name} with shape {self.shape(name)}, where config.json asks for "
                    f"{weight_map.hf_shape(name)}: take config.json and weights from the same model."
                )
            if self.dtype(name) is None:
                raise UserError(f"{self.folder} has {name} in a quantised dtype: use the unquantised model.")


def is_finite(tensor: Tensor) -> bool:
    """True if there is no NaN and no infinity, found in one pass without a temporary."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def some(names: Sequence[str]) -> str:
    """The first names, for an error message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"

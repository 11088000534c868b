"""Checkpoints of Megatron-core 0.19.2, on any machine: no code runs when one is loaded, no process is left behind."""

import pickle
import queue
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from megatron_fipo.compat.patching import Patch, View

# All that the pickled index of a torch.distributed checkpoint (".metadata") refers to, besides dtypes.
_INDEX_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}


class IndexUnpickler(pickle.Unpickler):
    """Reads an index and refuses names that have no place in it: anything else would run foreign code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"a checkpoint's index must not refer to {module}.{name}")
        return super().find_class(module, name)


def _load_index(original: Any) -> Any:
    return View(original, load=lambda file: IndexUnpickler(file).load())


def _load_plain_objects(original: Any) -> Any:
    def load(file: Any, **options: Any) -> Any:
        return torch.load(file, **options | {"weights_only": True})

    return View(original, load=load)


class _WriteResults:
    """What the writer of one save hands back, through an unlinked file that a forked writer shares."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None  # the writer was killed


def _write_results_queue(_original: Any) -> Callable[..., _WriteResults]:
    return lambda mp_mode="spawn": _WriteResults()


PATCHES = (
    Patch("torch.distributed.checkpoint.filesystem", "pickle", "unpickles whatever .metadata holds", _load_index),
    Patch(
        "torch.distributed.checkpoint.default_planner",
        "torch",
        "unpickles whatever a checkpoint's objects hold, with weights_only=False",
        _load_plain_objects,
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        "starts a manager that imports the program again, dies of a SIGTERM to the whole job, and outlives a SIGKILL",
        _write_results_queue,
    ),
)

"""Reads a Megatron torch_dist checkpoint tensor by tensor, without a model and without a process group.

The format stores each parameter under one key for the whole model, whatever layout wrote it: layers that are alike are
stacked along a first axis (or have keys of their own, if dense layers and mixtures alternate), experts along the next.
Every rank's shard is a chunk with its offsets in that whole; chunks lie one after the other in a few files.
"""

import io
import mmap
import pickle
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_fipo.checkpoint.hf_files import HFTensor, is_finite, some
from megatron_fipo.checkpoint.hf_map import EMBEDDING, OUTPUT, WeightMap, expert_of
from megatron_fipo.compat.checkpoints import IndexUnpickler
from megatron_fipo.errors import UserError
from megatron_fipo.model.hf_config import architecture

_MAPPED_BYTES = 2**27  # of a checkpoint's files before their pages are let go
TRACKER = "latest_checkpointed_iteration.txt"

_CONFIG = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "add_qkv_bias", "qk_layernorm",
)  # fmt: skip
_CONFIG_OF_EXPERTS = ("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax")
_PARAMETER = re.compile(r"(decoder|embedding|output_layer)\..*(weight|bias)")


def checkpoint_folder(folder: str | Path) -> Path:
    """The checkpoint in a folder of checkpoints that its tracker names.

    Raises:
        UserError: there is none.
    """
    root = Path(folder)
    tracker = root / TRACKER
    if not tracker.is_file():
        raise UserError(f"{root} holds no Megatron checkpoint (no {TRACKER}): give a folder that Megatron saved to.")
    step = tracker.read_text().strip()
    if step != "release" and not step.isdecimal():
        raise UserError(f"{tracker} says {step[:40]!r}, neither a number nor 'release': the folder is damaged.")
    found = root / (step if step == "release" else f"iter_{int(step):07d}")
    if not (found / ".metadata").is_file():
        raise UserError(
            f"{found}, which {TRACKER} names, is no torch_dist checkpoint (no .metadata): it is incomplete."
        )
    return found


class TorchDistWeights:
    """The model's parameters in a checkpoint, by the global names of a weight map (see `hf_map`)."""

    def __init__(self, folder: str | Path, hf_config_dir: str | Path) -> None:
        """Check that the checkpoint holds the model that `hf_config_dir`'s config.json describes.

        Raises:
            UserError: no checkpoint, a damaged `.metadata`, or parameters are missing, superfluous or misshapen.
        """
        self.folder = checkpoint_folder(folder)
        metadata = read_metadata(self.folder / ".metadata")
        self._storage = metadata.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and _PARAMETER.fullmatch(key)
        }
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._files: dict[str, tuple[io.BufferedReader, mmap.mmap]] = {}
        self._stacked = are_stacked(self._tensors)
        embedding = self._tensors.get(EMBEDDING)
        self._map = weight_map_of_config(hf_config_dir, embedding.size[0] if embedding else None)
        self._check(hf_config_dir)

    def layout(self, dtype: torch.dtype | None = None) -> list[HFTensor]:
        """What :meth:`hf_tensors` brings, in `dtype` (None: each parameter's own)."""
        return [
            HFTensor(hf_name, self._map.hf_shape(hf_name), dtype or self._entry(name)[0].properties.dtype)
            for name in self._map.names()
            for hf_name in self._map.rule(name).hf_names
        ]

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under their HF names, one parameter in memory at a time.

        Raises:
            UserError: a file is missing or damaged, or a tensor has NaNs or infinities.
        """
        mapped_bytes = 0
        for name in self._map.names():
            rule, full = self._map.rule(name), self._read(name)
            for hf_name, part in zip(rule.hf_names, rule.split(full), strict=True):
                yield hf_name, part.contiguous()  # here, so that whoever reads ahead takes this off the writer too
            mapped_bytes += full.nbytes
            if mapped_bytes > _MAPPED_BYTES:
                for _, mapped in self._files.values():
                    mapped.madvise(mmap.MADV_DONTNEED)  # as far as this process goes; who still reads maps them again
                mapped_bytes = 0

    def _key(self, name: str) -> tuple[str, tuple[int, ...]]:
        return stored_at(name, self._map, self._stacked)

    def _entry(self, name: str) -> tuple[TensorStorageMetadata, tuple[int, ...]]:
        key, place = self._key(name)
        return self._tensors[key], place

    def _check(self, hf_config_dir: str | Path) -> None:
        keys = {name: self._key(name) for name in self._map.names()}
        where = f"{self.folder}, read as the model of {hf_config_dir}/config.json,"
        if missing := [key for key, _ in keys.values() if key not in self._tensors]:
            raise UserError(f"{where} lacks {some(missing)}: take the configuration that the checkpoint was made with.")
        if extra := sorted(self._tensors.keys() - {key for key, _ in keys.values()}):
            raise UserError(f"{where} has {some(extra)} beyond it: take the configuration it was made with.")
        for name, (key, place) in keys.items():
            hf_shapes = [self._map.hf_shape(hf_name) for hf_name in self._map.rule(name).hf_names]
            rows = sum(shape[0] for shape in hf_shapes)
            stacked, shape = self._tensors[key].size[: len(place)], tuple(self._tensors[key].size[len(place) :])
            padded = name in (EMBEDDING, OUTPUT) and len(shape) == 2 and shape[0] >= rows
            fits = shape[1:] == hf_shapes[0][1:] and (padded or shape[0] == rows)
            if not fits or any(i >= size for i, size in zip(place, stacked, strict=True)):
                raise UserError(
                    f"{where} has {key} with shape {tuple(self._tensors[key].size)}, where {name} needs "
                    f"{(rows, *hf_shapes[0][1:])}: take the configuration that the checkpoint was made with."
                )

    def _read(self, name: str) -> Tensor:
        key, place = self._key(name)
        entry, axes = self._tensors[key], len(place)
        if key not in self._chunks:
            by_place: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in entry.chunks:
                by_place.setdefault(tuple(chunk.offsets[:axes]), []).append(chunk)
            self._chunks[key] = by_place
        chunks = self._chunks[key].get(place, ())
        shape = entry.size[axes:]
        if len(chunks) == 1 and chunks[0].sizes[axes:] == shape:
            full, read = self._read_chunk(key, chunks[0]).reshape(shape), shape.numel()
        else:
            full, read = torch.empty(shape, dtype=entry.properties.dtype), 0
            for chunk in chunks:
                window = full
                for axis, (start, size) in enumerate(zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True)):
                    window = window.narrow(axis, start, size)
                window.copy_(self._read_chunk(key, chunk).reshape(chunk.sizes[axes:]))
                read += window.numel()
        if read != full.numel():
            raise UserError(f"{self.folder} holds {read} of the {full.numel()} numbers of {name}: save it again.")
        if not is_finite(full):
            raise UserError(f"{self.folder} has NaN or infinite values in {name}: go back to an earlier checkpoint.")
        return full

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self.folder / info.relative_path
        try:
            if info.relative_path not in self._files:
                file = open(path, "rb")  # noqa: SIM115 (kept for the chunks that follow)
                self._files[info.relative_path] = file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            file, mapped = self._files[info.relative_path]
            tensor = _mapped_tensor(file, mapped, info.offset, info.length)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path} cannot be read at {key} ({reason}): copy the checkpoint again.") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise UserError(f"{path} holds no tensor of shape {tuple(chunk.sizes)} at {key}: copy it again.")
        return tensor


def _mapped_tensor(file: io.BufferedReader, mapped: mmap.mmap, offset: int, length: int) -> Any:
    """What torch.save wrote at ``offset``; a tensor's numbers are not read, they stay those of the mapped file."""
    with FakeTensorMode():  # torch.load then leaves the numbers out and tells where they are
        stored = cast(IO[bytes], _create_file_view(file, offset, length))
        found = torch.load(stored, map_location="cpu", weights_only=True)
    if not isinstance(found, Tensor):
        return found
    storage = found.untyped_storage()
    assert storage._checkpoint_offset is not None, "torch.load sets it under FakeTensorMode"
    start, count = offset + storage._checkpoint_offset, storage.nbytes() // found.dtype.itemsize
    numbers = torch.frombuffer(mapped, dtype=found.dtype, count=count, offset=start)
    return numbers.as_strided(found.shape, found.stride(), found.storage_offset())


def are_stacked(keys: Collection[str]) -> bool:
    """True if layers are stacked, so that no key of a parameter has a layer's number."""
    return not any(re.match(r"decoder\.layers\.\d", key) for key in keys)


def stored_at(name: str, weight_map: WeightMap, stacked: bool) -> tuple[str, tuple[int, ...]]:
    """The key of the parameter with this global name, and its place along the stacked axes (layer, expert)."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name, ()
    layer, below = int(match[1]), match[2]
    place: tuple[int, ...] = ()
    expert = expert_of(name)
    if expert is not None:
        below, place = re.sub(r"experts\.\d+", "experts.experts", below), (expert,)
    elif below == "input_layernorm.weight":
        below = "self_attention.linear_qkv.layer_norm_weight"
    elif below == "pre_mlp_layernorm.weight" and not weight_map.has_experts(layer):
        below = "mlp.linear_fc1.layer_norm_weight"
    return (f"decoder.layers.{below}", (layer, *place)) if stacked else (f"decoder.layers.{layer}.{below}", place)


def read_metadata(path: Path) -> Metadata:
    """The checkpoint's index. Raises UserError: it is damaged, or names code that has no place in it."""
    try:
        metadata = IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} cannot be read ({error!r}): copy the checkpoint again.") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} holds no checkpoint metadata: copy the checkpoint again.")
    return metadata


def weight_map_of_config(hf_config_dir: str | Path, padded_vocab_size: int | None = None) -> WeightMap:
    """The rules for the model that config.json describes, without a model (None: no padding)."""
    arguments = architecture(hf_config_dir)
    fields = {name: arguments[name] for name in _CONFIG}
    fields |= {name: arguments[name] for name in _CONFIG_OF_EXPERTS if name in arguments}
    config = TransformerConfig(
        **fields, num_moe_experts=arguments.get("num_experts"), gated_linear_unit=True, add_bias_linear=False
    )
    vocab_size = arguments["vocab_size"]
    tied = not arguments["untie_embeddings_and_output_weights"]
    return WeightMap(config, vocab_size, padded_vocab_size or vocab_size, tied)

"""Writes a torch_dist checkpoint from a Hugging Face folder, one parameter in memory at a time.

Megatron's writer takes a whole state dictionary. Here it writes all but the weights - arguments, version, its modules'
extra state - from a model whose memory is never touched; then the ranks stream the weights into files of their own, and
the first adds them to the checkpoint's index. Every rank writes whole tensors, whatever the layout.
"""

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from megatron_fipo.checkpoint.hf import weight_map_of
from megatron_fipo.checkpoint.hf_files import HFWeights
from megatron_fipo.checkpoint.hf_map import WeightMap
from megatron_fipo.checkpoint.hf_write import PieceWriter, read_ahead
from megatron_fipo.checkpoint.torch_dist import are_stacked, read_metadata, stored_at
from megatron_fipo.model.hf_config import read_hf_config


class _Entry(NamedTuple):
    """A tensor in a file."""

    properties: TensorProperties
    shape: torch.Size
    info: _StorageInfo


def save_torch_dist(chunks: Sequence[Any], hf_dir: str | Path, folder: str | Path) -> None:
    """Write the folder's weights, in the dtype of the model's parameters, as the release checkpoint of `folder`.

    Collective over all ranks. Megatron's global arguments must say `save` = `folder`, `no_save_optim`, `no_save_rng`.

    Args:
        chunks: this rank's chunks; their parameters are neither read nor written.

    Raises:
        UserError: tensors are missing, superfluous, misshapen or not finite.
    """
    weights = HFWeights(hf_dir)
    weight_map = weight_map_of(chunks, read_hf_config(hf_dir)["vocab_size"])
    weights.check(weight_map)
    keys: set[str] = set()
    for chunk in chunks:
        _leave_out_weights(unwrap_model(chunk), keys)
    checkpointing.save_checkpoint(0, chunks, None, None, 0, release=True)

    release, rank, size = Path(folder) / "release", dist.get_rank(), dist.get_world_size()
    mine = list(weight_map.names())[rank::size]
    stacked = are_stacked(keys)
    tensors = read_ahead(_merged(mine, weights, weight_map, stacked))
    entries = _write(release / f"weights_{rank}.distcp", tensors)
    of_rank = [entries] * size
    dist.all_gather_object(of_rank, entries)
    if rank == 0:
        everywhere = {name: entry for part in of_rank for name, entry in part.items()}
        _index(release / ".metadata", everywhere, weight_map, stacked)
    dist.barrier()


def _leave_out_weights(model: Any, keys: set[str]) -> None:
    """Make the model describe itself without its parameters to Megatron's writer; collect their keys."""
    describe = model.sharded_state_dict

    def without_weights(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = describe(*args, **kwargs)
        left_out = {n: v for n, v in state.items() if isinstance(v, ShardedTensor | ShardedTensorFactory)}
        keys.update(value.key for value in left_out.values())
        return {name: value for name, value in state.items() if name not in left_out}

    model.sharded_state_dict = without_weights


def _merged(
    names: Sequence[str], weights: HFWeights, weight_map: WeightMap, stacked: bool
) -> Iterator[tuple[str, Tensor]]:
    """Megatron's full tensors, with an axis of length 1 for each axis along which the format stacks them."""
    for name in names:
        rule = weight_map.rule(name)
        full = rule.merge([weights[hf_name] for hf_name in rule.hf_names]).to(weight_map.config.params_dtype)
        _, place = stored_at(name, weight_map, stacked)
        yield name, full.reshape(*[1] * len(place), *full.shape)


def _write(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, _Entry]:
    """Write tensors one after the other, each as torch.save does; where they are, by name."""
    entries = {}
    # torch.load never looks at the checksums inside, and computing them takes as long as writing a quarter of the file.
    no_checksums = serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
    with PieceWriter(path) as file, no_checksums:
        for name, tensor in tensors:
            start = file.tell()
            torch.save(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(), file)
            info = _StorageInfo(path.name, start, file.tell() - start)
            entries[name] = _Entry(TensorProperties.create_from_tensor(tensor), tensor.shape, info)
    return entries


def _index(path: Path, entries: Mapping[str, _Entry], weight_map: WeightMap, stacked: bool) -> None:
    """Add the tensors to the checkpoint's `.metadata`."""
    metadata = read_metadata(path)
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for name, entry in entries.items():
        key, place = stored_at(name, weight_map, stacked)
        offsets = torch.Size([*place, *[0] * (len(entry.shape) - len(place))])
        chunks.setdefault(key, []).append(ChunkStorageMetadata(offsets, entry.shape))
        metadata.storage_data[MetadataIndex(key, offsets)] = entry.info
        along = ([weight_map.config.num_layers] if stacked else []) + [weight_map.config.num_moe_experts or 0]
        whole = torch.Size([*along[: len(place)], *entry.shape[len(place) :]])
        metadata.state_dict_metadata[key] = TensorStorageMetadata(entry.properties, whole, chunks[key])
    partial = path.with_name(".metadata.partial")
    partial.write_bytes(pickle.dumps(metadata))
    os.replace(partial, path)

"""Writes Hugging Face folders from a stream of tensors, without holding more than one of them."""

import io
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.checkpoint.hf import export_hf_weights, hf_layout
from megatron_fipo.checkpoint.hf_files import DTYPES, HFTensor, HFWeights
from megatron_fipo.checkpoint.side_files import copy_side_files
from megatron_fipo.model.hf_config import read_hf_config

MAX_SHARD_BYTES = 4 * 2**30
_PIECE_BYTES = 2**18

_CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    hf_source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as an HF folder; `out_dir` appears whole or not at all, and replaces a folder of that name.

    Collective: all ranks call it; rank 0 writes.

    Args:
        hf_source_dir: where config, tokenizer and generation settings are copied from.
        dtype: of the written tensors; None: each tensor's dtype in the source.
    """
    vocab_size = read_hf_config(hf_source_dir)["vocab_size"]
    source = HFWeights(hf_source_dir)
    layout = [
        HFTensor(t.name, t.shape, dtype or source.dtype(t.name) or t.dtype) for t in hf_layout(model_chunks, vocab_size)
    ]
    stream = export_hf_weights(model_chunks, vocab_size)
    if dist.get_rank() == 0:
        write_hf_folder(stream, layout, hf_source_dir, out_dir, dtype)
    else:
        for _ in stream:
            pass
    dist.barrier()


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]],
    layout: Sequence[HFTensor],
    hf_source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write the stream `tensors`, which brings what `layout` says, beside the files of `hf_source_dir`.

    The folder is built as OUT.partial and renamed; what it replaces is removed after that.

    Args:
        dtype: written into config.json; None: the configuration stays as it is.
        quantization: the quantization_config of config.json.
    """
    source, out = Path(hf_source_dir), Path(out_dir)
    partial, replaced = out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")
    if replaced.exists() and not out.exists():  # killed between the two renames below
        replaced.rename(out)
    for folder in (partial, replaced):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        copy_side_files(source, partial, dtype, quantization)
        _write_shards(iter(tensors), layout, partial)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


class PieceWriter(io.FileIO):
    """A new file, to which large buffers go piece by piece.

    The kernel takes page cache in blocks as large as the write: small ones it has at hand, while huge ones are cleared
    or, in a virtual machine, fetched from the host first, which takes several times as long as the copying.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[super().write(rest[:_PIECE_BYTES]) :]
        return size


def read_ahead(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same stream; the next two are read while the caller works on one. Not for a stream of collectives.

    Two, since norms lie between the matrices: a norm is written before the matrix behind it can be read. The reader
    computes on one core: it is not what the stream waits for, and OpenMP's idle threads would take the writer's.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as reader:
        pending = deque(reader.submit(next, tensors, None) for _ in range(2))
        while (item := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, tensors, None))
            yield item


def _write_shards(tensors: Iterator[tuple[str, Tensor]], layout: Sequence[HFTensor], folder: Path) -> None:
    shards = _cut(layout)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(map(_bytes, layout))},
            "weight_map": {t.name: file for file, shard in zip(names, shards, strict=True) for t in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file_name, shard in zip(names, shards, strict=True):
        with PieceWriter(folder / file_name) as file:
            file.write(_header(shard))
            for expected in shard:
                name, tensor = next(tensors)
                assert (name, tuple(tensor.shape)) == (expected.name, expected.shape), f"{name} instead of {expected}"
                file.write(tensor.to("cpu", expected.dtype).contiguous().view(torch.uint8).numpy())
    assert next(tensors, None) is None, "the stream goes on after the layout's last tensor"


def _cut(layout: Sequence[HFTensor]) -> list[list[HFTensor]]:
    """Files of at most MAX_SHARD_BYTES, except for a single larger tensor."""
    shards: list[list[HFTensor]] = [[]]
    filled = 0
    for tensor in layout:
        if shards[-1] and filled + _bytes(tensor) > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    return shards


def _header(shard: Sequence[HFTensor]) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + _bytes(tensor)
        entries[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: HFTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize

"""Streams weights between a Hugging Face folder and the Megatron model, one parameter at a time."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.checkpoint.hf_map import WeightMap
from megatron_fipo.errors import UserError
from megatron_fipo.model.hf_config import read_hf_config, weight_files

MAX_SHARD_BYTES = 4 * 2**30

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFWeights:
    """The tensors of an HF folder by name, read when asked for."""

    def __init__(self, hf_dir: str | Path) -> None:
        self._files: dict[str, Any] = {}
        for path in weight_files(hf_dir):
            handle = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """None: a dtype that is no plain floating-point weight, such as FP8."""
        return _DTYPES.get(self._files[name].get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], hf_dir: str | Path) -> None:
    """Copy the folder's weights into the model, cast to its parameters' dtype.

    Call it before the optimizer is built, or let the optimizer reload its main parameters afterwards.

    Args:
        model_chunks: this rank's chunks, wrapped or not.
        hf_dir: the folder that `megatron_arguments` described.

    Raises:
        UserError: tensors are missing, superfluous or misshapen.
    """
    weights = HFWeights(hf_dir)
    vocab_size = read_hf_config(hf_dir)["vocab_size"]
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for chunk in model_chunks:
        weight_map = _weight_map(chunk, vocab_size)
        _check(weights, weight_map, hf_dir)
        for name, parameter in _global_parameters(chunk):
            rule = weight_map.rule(name)
            full = rule.merge([weights[hf_name] for hf_name in rule.hf_names])
            parameter.copy_(rule.shard(full, size, rank))


@torch.no_grad()
def export_hf_weights(model_chunks: Sequence[torch.nn.Module], vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their HF names, in the parameters' dtype and on their device.

    Collective: every rank of the tensor-parallel group must iterate to the end. A tensor is valid until the next one.

    Args:
        vocab_size: rows of the embedding to keep; the rest is Megatron's padding.
    """
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1, "export over pipeline stages comes later"
    group = parallel_state.get_tensor_model_parallel_group()
    for chunk in model_chunks:
        weight_map = _weight_map(chunk, vocab_size)
        for name, parameter in _global_parameters(chunk):
            rule = weight_map.rule(name)
            shards = [parameter.detach()]
            if rule.tp_axis is not None and group.size() > 1:
                shards = [torch.empty_like(parameter) for _ in range(group.size())]
                dist.all_gather(shards, parameter.detach().contiguous(), group=group)
            yield from zip(rule.hf_names, rule.split(rule.unshard(shards)), strict=True)


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
    source, out = Path(hf_source_dir), Path(out_dir)
    weights = HFWeights(source)
    writes = dist.get_rank() == 0
    partial = out.with_name(out.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and not re.fullmatch(r".*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?", file.name):
                shutil.copy(file, partial)
    writer = _ShardWriter(partial)
    for name, tensor in export_hf_weights(model_chunks, read_hf_config(source)["vocab_size"]):
        if writes:
            writer.add(name, tensor.to("cpu", dtype or weights.dtype(name)))
    if writes:
        writer.finish()
        if dtype is not None:
            config = json.loads((partial / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    dist.barrier()


class _ShardWriter:
    """Writes tensors as they come, in files of at most MAX_SHARD_BYTES, with HF's names and index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._pending, self._folder / f"{len(self._shards)}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            (self._folder / "0.safetensors").rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / f"{i}.safetensors").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _weight_map(chunk: torch.nn.Module, vocab_size: int) -> WeightMap:
    model = unwrap_model(chunk)
    return WeightMap(get_model_config(model), vocab_size, model.vocab_size, model.share_embeddings_and_output_weights)


def _global_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The chunk's parameters with layers numbered over the whole model."""
    model = unwrap_model(chunk)
    for name, parameter in model.named_parameters():
        match = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match:
            layer = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{layer}.{match[2]}"
        yield name, parameter


def _check(weights: HFWeights, weight_map: WeightMap, hf_dir: str | Path) -> None:
    wanted, present = set(weight_map.hf_names()), weights.names()
    # Buffers of old exports, and the head that some exports of tied models repeat.
    ignored = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    if weight_map.tied:
        ignored.add("lm_head.weight")
    if missing := sorted(wanted - present):
        raise UserError(f"{hf_dir} lacks {_some(missing)}: download the model's safetensors files again.")
    if extra := sorted(present - wanted - ignored):
        raise UserError(f"{hf_dir} has {_some(extra)}, which its config.json does not account for: check config.json.")
    for name in sorted(wanted):
        if weights.shape(name) != weight_map.hf_shape(name):
            raise UserError(
                f"{hf_dir} has {name} with shape {weights.shape(name)}, where config.json asks for "
                f"{weight_map.hf_shape(name)}: take config.json and weights from the same model."
            )
        if weights.dtype(name) is None:
            raise UserError(f"{hf_dir} has {name} in a quantised dtype: use the unquantised model.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"

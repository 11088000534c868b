"""Weights as flattened buckets: which tensors travel together, and their bytes back to back.

A receiver rebuilds the tensors of a bucket from names, dtypes and shapes alone, so both sides must compute the same
sizes: everything here follows from one list of tensors.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorSpec":
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel as one message, in order."""

    specs: tuple[TensorSpec, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    def description(self) -> dict[str, Any]:
        """What a receiver must be told."""
        return {
            "names": [spec.name for spec in self.specs],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in self.specs],
            "shapes": [list(spec.shape) for spec in self.specs],
        }

    def tensors(self, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors in ``data``, uint8 [nbytes], as views."""
        offset = 0
        for spec in self.specs:
            yield spec.name, data[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            offset += spec.nbytes


def plan_buckets(layout: Sequence[TensorSpec], capacity: int) -> list[Bucket]:
    """Cut ``layout`` into buckets of at most ``capacity`` bytes; a larger tensor has one of its own.

    A bucket also ends where the next tensor would not be aligned to its dtype, which receivers refuse.
    """
    buckets: list[list[TensorSpec]] = []
    filled = 0
    for spec in layout:
        if not buckets or filled + spec.nbytes > capacity or filled % spec.dtype.itemsize:
            buckets.append([])
            filled = 0
        buckets[-1].append(spec)
        filled += spec.nbytes
    return [Bucket(tuple(specs)) for specs in buckets]


def make_buffers(buckets: Sequence[Bucket], capacity: int, device: torch.device) -> list[Tensor]:
    """Room for two buckets, or for one if there is no other: uint8, of at most ``capacity`` bytes."""
    sizes = [bucket.nbytes for bucket in buckets if bucket.nbytes <= capacity]
    return [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in sizes[:2]]


def fill_buckets(
    stream: Iterator[tuple[str, Tensor]], buckets: Sequence[Bucket], buffers: Sequence[Tensor]
) -> Iterator[tuple[Bucket, Tensor]]:
    """Each bucket with its bytes, uint8 [nbytes].

    Two buffers take turns: what is in one stays until the next but one bucket is asked for, so that the next is filled
    while one is on the wire. A tensor too large for a buffer is not copied: the bytes are its own.
    Raises ValueError if the stream's tensors are not those of the buckets.
    """
    turns = itertools.cycle(buffers)
    for bucket in buckets:
        if any(bucket.nbytes <= len(buffer) for buffer in buffers):
            data = next(turns)[: bucket.nbytes]
            for spec, (_, target) in zip(bucket.specs, bucket.tensors(data), strict=True):
                target.copy_(_take(stream, spec))
        else:
            (spec,) = bucket.specs
            data = _take(stream, spec).contiguous().view(-1).view(torch.uint8)
        yield bucket, data
    for name, _ in stream:
        raise ValueError(f"the export gave {name} beyond its list")


def _take(stream: Iterator[tuple[str, Tensor]], spec: TensorSpec) -> Tensor:
    name, tensor = next(stream, ("nothing", torch.empty(0)))
    if TensorSpec.of(name, tensor) != spec:
        raise ValueError(f"the export gave {name} {list(tensor.shape)} in the place of {spec}")
    return tensor

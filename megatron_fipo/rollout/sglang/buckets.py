"""Weights as flattened buckets: which tensors travel together, and their bytes back to back.

A receiver rebuilds the tensors of a bucket from names, dtypes and shapes alone, so both sides must compute the same
sizes: everything here follows from one list of tensors.
"""

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


def fill_buckets(
    stream: Iterator[tuple[str, Tensor]], buckets: Sequence[Bucket], device: torch.device
) -> Iterator[tuple[Bucket, Tensor]]:
    """Each bucket with its bytes, uint8 [nbytes] on ``device``.

    Two buffers take turns: a bucket's bytes stay until the next but one is asked for, so the next is filled while one
    is on the wire. Raises ValueError if the stream's tensors are not those of the buckets.
    """
    largest = max(bucket.nbytes for bucket in buckets)
    buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in buckets[:2]]
    for number, bucket in enumerate(buckets):
        data = buffers[number % 2][: bucket.nbytes]
        for spec, (_, target) in zip(bucket.specs, bucket.tensors(data), strict=True):
            name, tensor = next(stream, ("nothing", torch.empty(0)))
            if TensorSpec.of(name, tensor) != spec:
                raise ValueError(f"the export gave {name} {list(tensor.shape)} in the place of {spec}")
            target.copy_(tensor)
        yield bucket, data
    for name, _ in stream:
        raise ValueError(f"the export gave {name} beyond its list")

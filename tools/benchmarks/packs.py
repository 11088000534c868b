"""Packs of sequences that the benchmarks run on, and what is recorded about the machine."""

from dataclasses import dataclass

import torch

from megatron_fipo import _host
from megatron_fipo.observe.environment import describe_environment


@dataclass(frozen=True)
class Pack:
    """name; cu_seqlens int64 [S + 1]; shape (sequences, length) where all have one length, else None."""

    name: str
    cu_seqlens_S1: torch.Tensor
    shape: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        return int(self.cu_seqlens_S1[-1])

    @property
    def sequences(self) -> int:
        return self.cu_seqlens_S1.shape[0] - 1


def equal_lengths(sequences: int, length: int) -> Pack:
    return Pack(f"{sequences} x {length}", torch.arange(sequences + 1) * length, (sequences, length))


def ragged(tokens: int, seed: int = 1) -> Pack:
    """At least `tokens`, lengths log-normal around 1,800 up to 20,480, like responses of a reasoning model."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(torch.randn(tokens // 500, generator=generator) + 7.5).long().clamp(1, 20_480)
    cut = int(torch.searchsorted(lengths.cumsum(0), tokens)) + 1
    offsets = torch.nn.functional.pad(lengths[:cut].cumsum(0), (1, 0))
    return Pack(f"{cut} ragged, {int(offsets[-1]) / 1e6:.1f} M tokens", offsets, None)


def environment() -> dict:
    return describe_environment() | {
        "threads": torch.get_num_threads(),
        "cpu_capability": _host.cpu_capability()["selected"],
        "build": _host.build_info(),
    }

"""Which sequences of a pack are attended together, padded to one length.

Made from boundaries that the host knows, once for all layers: no layer waits for the device.

Sequences join a group, longest first, until the pairs of positions that padding wastes outweigh another call. Padding
comes behind the tokens, so that causality keeps it from them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_fipo.parallel.zigzag import chunks_of_ranks, token_index


@dataclass(frozen=True, eq=False)
class PaddedGroup:
    """Rows of one attention call.

    query_source, key_source  int64, where the tokens lie in the query and key tensors
    query_target, key_target  int64, where they lie in the padded batch [rows, length], flattened
    mask  bool [rows, 1, query_length, key_length], true where a query sees a key; None: plain causal
    """

    rows: int
    query_length: int
    key_length: int
    query_source: Tensor
    query_target: Tensor
    key_source: Tensor
    key_target: Tensor
    mask: Tensor | None = None

    def padded(self, x: Tensor, source: Tensor, target: Tensor, length: int) -> Tensor:
        """Tokens of x [t, heads, d] as [rows, heads, length, d], 0 in the padding."""
        batch = x.new_zeros(self.rows * length, *x.shape[1:]).index_copy(0, target, x.index_select(0, source))
        return batch.view(self.rows, length, *x.shape[1:]).transpose(1, 2)

    def to(self, device: torch.device) -> "PaddedGroup":
        """The same group with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class PackedBoundaries(PackedSeqParams):
    """Megatron's description of a pack, and its boundaries on the host: () if nobody there needs them."""

    boundaries: tuple[int, ...] = ()


@functools.lru_cache(maxsize=4)  # every layer of a micro-batch asks the same; long sequences have large masks
def groups_on_device(
    cu_seqlens: tuple[int, ...], context: tuple[int, int], call_cost: float, device: torch.device
) -> list[PaddedGroup]:
    """`groups_of_sequences`, or with `context`, (rank, size), of more than one rank `groups_of_runs`, on `device`."""
    if context[1] > 1:
        groups = groups_of_runs(cu_seqlens, *context, call_cost)
    else:
        groups = groups_of_sequences(cu_seqlens, call_cost)
    return [group.to(device) for group in groups]


def groups_of_sequences(cu_seqlens: tuple[int, ...], call_cost: float) -> list[PaddedGroup]:
    """Groups of whole sequences, in plain causal attention.

    Args:
        cu_seqlens: boundaries of the sequences in the pack.
        call_cost: what one more call costs, in pairs of positions.
    """
    lengths = [end - start for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    groups = []
    for members in _alike(lengths, call_cost):
        longest = lengths[members[0]]
        source = torch.cat([torch.arange(cu_seqlens[s], cu_seqlens[s + 1]) for s in members])
        target = torch.cat([torch.arange(lengths[s]) + i * longest for i, s in enumerate(members)])
        groups.append(PaddedGroup(len(members), longest, longest, source, target, source, target))
    return groups


def groups_of_runs(cu_seqlens: tuple[int, ...], rank: int, size: int, call_cost: float) -> list[PaddedGroup]:
    """Groups of context-parallel rank `rank`'s runs: each sees its sequence's keys up to its own end.

    Queries are this rank's tokens; keys those of all ranks, shard behind shard in rank order. The first runs of all
    sequences and the second ones are grouped apart, since a second run sees more keys than a first of equal length.

    Args:
        cu_seqlens: boundaries of the sequences in the whole pack, multiples of 2 * size apart.
        call_cost: what one more call costs, in pairs of positions.
    """
    boundaries = torch.tensor(cu_seqlens)
    num_tokens = cu_seqlens[-1]
    in_rank_order = torch.cat([token_index(boundaries, num_tokens, r, size) for r in range(size)])
    key_place = torch.empty_like(in_rank_order).index_copy(0, in_rank_order, torch.arange(num_tokens))
    query_place = key_place - rank * (num_tokens // size)  # of this rank's own tokens
    lengths = [(end - start) // (2 * size) for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    groups = []
    for chunk in chunks_of_ranks(size)[rank].tolist():
        for members in _alike(lengths, call_cost / (chunk + 1)):
            query_length = lengths[members[0]]
            key_length = (chunk + 1) * query_length
            own = [(cu_seqlens[s], lengths[s]) for s in members]
            first_query = torch.tensor([chunk * n for _, n in own])
            last_key = first_query[:, None] + torch.arange(query_length)  # [rows, queries]
            groups.append(
                PaddedGroup(
                    len(members),
                    query_length,
                    key_length,
                    torch.cat([query_place[start + chunk * n : start + (chunk + 1) * n] for start, n in own]),
                    torch.cat([torch.arange(n) + i * query_length for i, (_, n) in enumerate(own)]),
                    torch.cat([key_place[start : start + (chunk + 1) * n] for start, n in own]),
                    torch.cat([torch.arange((chunk + 1) * n) + i * key_length for i, (_, n) in enumerate(own)]),
                    (torch.arange(key_length) <= last_key[..., None])[:, None],
                )
            )
    return groups


def _alike(lengths: Sequence[int], call_cost: float) -> list[list[int]]:
    """Numbers of the sequences that go together, longest first; empty sequences are left out."""
    groups: list[list[int]] = []
    longest, wasted = 0, math.inf
    for s in sorted((s for s, n in enumerate(lengths) if n), key=lambda s: -lengths[s]):
        wasted += longest**2 - lengths[s] ** 2
        if wasted > call_cost:
            groups.append([])
            longest, wasted = lengths[s], 0
        groups[-1].append(s)
    return groups

"""Megatron's context-parallel layout, known here and nowhere else.

Each sequence is padded to a multiple of 2 * size tokens and cut into 2 * size chunks of equal length. Rank i holds
chunks i and 2 * size - 1 - i, so that causal attention costs every rank the same:

    chunk      0 1 2 3 4 5 6 7        size 4
    of rank    0 1 2 3 3 2 1 0

A rank's tokens lie sequence by sequence, the earlier chunk before the later one: two runs of consecutive tokens per
sequence. A padded batch [B, L] is a pack of B sequences of L tokens, row after row.

Shape suffixes: _T tokens of the pack, _t those of this rank (T / size), _S sequences, _R runs of this rank (2 S),
_S1 and _R1 their boundaries, _BL padded rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fipo.ops.packed import check_cu_seqlens, check_offsets


def chunks_of_ranks(size: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [size, 2]: the two chunks that each context-parallel rank holds."""
    rank_I = torch.arange(size, device=device)
    return torch.stack([rank_I, 2 * size - 1 - rank_I], dim=1)


def pad_cu_seqlens(cu_seqlens_S1: Tensor, multiple: int) -> Tensor:
    """[S + 1] like cu_seqlens: every length rounded up to `multiple`, for context parallelism one of 2 * size."""
    lengths_S = (cu_seqlens_S1.diff() + multiple - 1) // multiple * multiple
    return torch.nn.functional.pad(lengths_S.cumsum(0, dtype=cu_seqlens_S1.dtype), (1, 0))


def uniform_cu_seqlens(batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [B + 1]: a padded batch [B, L] as a pack."""
    return length * torch.arange(batch + 1, dtype=torch.int32, device=device)


def run_cu_seqlens(cu_seqlens_S1: Tensor, size: int) -> Tensor:
    """[2 S + 1] like cu_seqlens, the padded ones of the whole pack: the runs of one rank, the same for every rank.

    Raises ValueError if a sequence is not a multiple of 2 * size tokens long (not looked at on an accelerator, which
    would have to wait).
    """
    _check(cu_seqlens_S1, size)
    starts_S1 = cu_seqlens_S1 // size
    runs_S2 = torch.stack([starts_S1[:-1], (starts_S1[:-1] + starts_S1[1:]) // 2], dim=1)
    return torch.cat([runs_S2.flatten(), starts_S1[-1:]])


def token_index(cu_seqlens_S1: Tensor, num_tokens: int, rank: int, size: int) -> Tensor:
    """int64 [t]: where in the pack each token of `rank` stands; `values_T[index_t]` is that rank's shard.

    num_tokens: those of the pack, cu_seqlens[-1], known to the host without a wait for the device.
    """
    runs_R1 = run_cu_seqlens(cu_seqlens_S1, size).long()
    length_R = runs_R1.diff()
    chunk_R = chunks_of_ranks(size, cu_seqlens_S1.device)[rank].repeat(cu_seqlens_S1.shape[0] - 1)
    begin_R = cu_seqlens_S1[:-1].long().repeat_interleave(2) + chunk_R * length_R
    local_t = torch.arange(num_tokens // size, device=cu_seqlens_S1.device)
    return local_t + (begin_R - runs_R1[:-1]).repeat_interleave(length_R, output_size=num_tokens // size)


def shard(values_T: Tensor, cu_seqlens_S1: Tensor, rank: int, size: int) -> Tensor:
    """[t, ...]: the tokens of `rank`. For several tensors of one pack take `token_index` once."""
    return values_T[token_index(cu_seqlens_S1, values_T.shape[0], rank, size)]


def unshard(shards: Sequence[Tensor], cu_seqlens_S1: Tensor) -> Tensor:
    """[T, ...]: the pack from the shards of all ranks, in rank order."""
    size = len(shards)
    num_tokens = size * shards[0].shape[0]
    index_T = torch.cat([token_index(cu_seqlens_S1, num_tokens, rank, size) for rank in range(size)])
    values_T = torch.cat(list(shards))
    return torch.empty_like(values_T).index_copy(0, index_T, values_T)


def shard_rows(values_BL: Tensor, rank: int, size: int) -> Tensor:
    """[B, L / size, ...]: the tokens of `rank` of a padded batch. Flattened they are the shard of its pack."""
    batch, length = values_BL.shape[:2]
    if length % (2 * size):
        raise ValueError(f"rows must be a multiple of {2 * size} (2 x context-parallel size) tokens long, not {length}")
    chunks = values_BL.reshape(batch, 2 * size, -1, *values_BL.shape[2:])
    return chunks[:, chunks_of_ranks(size, values_BL.device)[rank]].flatten(1, 2)


def _check(cu_seqlens_S1: Tensor, size: int) -> None:
    check_cu_seqlens(cu_seqlens_S1)
    if cu_seqlens_S1.device.type != "cpu" or torch.compiler.is_compiling():
        return
    check_offsets(cu_seqlens_S1, int(cu_seqlens_S1[-1]))
    uneven_S = cu_seqlens_S1.diff() % (2 * size) != 0
    if bool(uneven_S.any()):
        s = int(uneven_S.nonzero()[0])
        raise ValueError(
            f"sequence {s} has {int(cu_seqlens_S1[s + 1] - cu_seqlens_S1[s])} tokens, which context parallelism over "
            f"{size} ranks cannot cut into {2 * size} equal chunks: pad with pad_cu_seqlens(cu_seqlens, {2 * size})"
        )

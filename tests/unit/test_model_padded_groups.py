"""Which tokens attend together: every pair that causality allows, and no other, at a bounded waste."""

import itertools

import pytest
import torch

from megatron_fipo.model.padded_groups import groups_of_runs, groups_of_sequences
from megatron_fipo.parallel.zigzag import token_index


def boundaries(lengths: list[int]) -> tuple[int, ...]:
    return (0, *itertools.accumulate(lengths))


def test_groups_cover_every_token_once_and_bound_the_waste():
    generator = torch.Generator().manual_seed(0)
    for call_cost in (0.0, 1000.0, 50_000.0, 1e12):
        for _ in range(20):
            count = int(torch.randint(1, 40, (), generator=generator))
            lengths = torch.randint(0, 200, (count,), generator=generator).tolist()
            cu_seqlens = boundaries(lengths)
            groups = groups_of_sequences(cu_seqlens, call_cost)
            covered = [t for group in groups for t in group.query_source.tolist()]
            assert sorted(covered) == list(range(cu_seqlens[-1]))
            squares = sum(n * n for n in lengths)
            assert sum(g.rows * g.query_length**2 for g in groups) <= squares + len(groups) * call_cost
            for g in groups:
                assert g.query_target.unique().numel() == g.query_target.numel() == g.query_source.numel()
                assert int(g.query_target.max()) < g.rows * g.query_length
            assert len(groups) <= (1 if call_cost == 1e12 else count)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("call_cost", [0.0, 100.0, 1e12])
def test_a_rank_sees_each_key_before_its_query(size, call_cost):
    """Spelled out pair by pair: (query, key) numbers in the pack, for all ranks together."""
    lengths = [2 * size * n for n in (3, 0, 1, 7, 7)]
    cu_seqlens = boundaries(lengths)
    shards = [token_index(torch.tensor(cu_seqlens), cu_seqlens[-1], rank, size) for rank in range(size)]
    gathered = torch.cat(shards)
    pairs = []
    for rank in range(size):
        for g in groups_of_runs(cu_seqlens, rank, size, call_cost):
            queries, keys = shards[rank][g.query_source].tolist(), gathered[g.key_source].tolist()
            query_at = dict(zip(g.query_target.tolist(), queries, strict=True))
            key_at = dict(zip(g.key_target.tolist(), keys, strict=True))
            for row, i, j in g.mask[:, 0].nonzero().tolist():
                query, key = query_at.get(row * g.query_length + i), key_at.get(row * g.key_length + j)
                if query is not None:  # padded queries may look at anything; nobody reads them
                    pairs.append((query, key))
    expected = [
        (query, key)
        for start, end in itertools.pairwise(cu_seqlens)
        for query in range(start, end)
        for key in range(start, query + 1)
    ]
    assert sorted(pairs) == expected

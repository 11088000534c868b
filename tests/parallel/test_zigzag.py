"""The zigzag layout against Megatron's own functions, and the ways through it against each other."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from megatron_fipo.parallel import zigzag

LAYOUTS = [(size, rank) for size in (1, 2, 4, 8) for rank in range(size)]
LENGTHS = [0, 1, 5, 100, 0, 37, 16]


def padded(size: int) -> torch.Tensor:
    real = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return zigzag.pad_cu_seqlens(real, 2 * size)


def megatron_shards() -> tuple[dict, dict]:
    """By Megatron-core, in a process of its own where each rank in turn is the only one: the shard of a padded batch
    [3, 48], and of each sequence of the pack as rotary embeddings see it."""
    import torch.distributed as dist
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rows, packs = {}, {}
    for size, rank in LAYOUTS:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        batch = {"tokens": torch.arange(3 * 48).view(3, 48), "cu_seqlens": None}
        rows[size, rank] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=dist.group.WORLD)["tokens"]
        dist.destroy_process_group()
        cu = padded(size).tolist()
        packs[size, rank] = torch.cat(
            [
                _get_thd_freqs_on_this_cp_rank(rank, size, torch.empty((end - start) // size), torch.arange(start, end))
                for start, end in zip(cu[:-1], cu[1:], strict=True)
            ]
        )
    return rows, packs


@pytest.fixture(scope="module")
def megatron_layout():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(megatron_shards).result(timeout=120)


def transformer_engine_index(cu_seqlens: list[int], total_tokens: int, size: int, rank: int) -> list[int]:
    """TransformerEngine's thd_partition_indices_kernel (common/fused_attn/context_parallel.cu), by which Megatron cuts
    packs on GPUs, in Python."""
    local = [c // size for c in cu_seqlens]
    indices = []
    for token in range(total_tokens // size):
        s = next(s for s in range(len(local) - 1) if local[s] <= token < local[s + 1])
        length, index = local[s + 1] - local[s], token - local[s]
        offset = rank if index < length // 2 else (size - 1) * 2 - rank
        indices.append(index + local[s] * size + length // 2 * offset)
    return indices


@pytest.mark.parametrize("size, rank", LAYOUTS)
def test_agrees_with_megatron(megatron_layout, size, rank):
    rows, packs = megatron_layout
    batch = torch.arange(3 * 48).view(3, 48)
    assert torch.equal(zigzag.shard_rows(batch, rank, size), rows[size, rank])
    assert torch.equal(zigzag.shard(torch.arange(int(padded(size)[-1])), padded(size), rank, size), packs[size, rank])


@pytest.mark.parametrize("size, rank", LAYOUTS)
def test_agrees_with_transformer_engine(size, rank):
    cu = padded(size)
    expected = transformer_engine_index(cu.tolist(), int(cu[-1]), size, rank)
    assert zigzag.token_index(cu, int(cu[-1]), rank, size).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_runs_are_consecutive_tokens_of_the_chunks(size):
    cu = padded(size)
    runs = zigzag.run_cu_seqlens(cu, size)
    assert runs.dtype == cu.dtype and len(runs) == 2 * len(LENGTHS) + 1
    for rank in range(size):
        index = zigzag.token_index(cu, int(cu[-1]), rank, size)
        assert int(runs[-1]) == len(index)
        for s, start in enumerate(cu[:-1].tolist()):
            chunk = (int(cu[s + 1]) - start) // (2 * size)
            for run, number in zip((2 * s, 2 * s + 1), zigzag.chunks_of_ranks(size)[rank].tolist(), strict=True):
                own = index[runs[run] : runs[run + 1]].tolist()
                assert own == list(range(start + number * chunk, start + (number + 1) * chunk))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unshard_undoes_shard(size):
    cu = padded(size)
    values = torch.randn(int(cu[-1]), 3)
    assert torch.equal(zigzag.unshard([zigzag.shard(values, cu, r, size) for r in range(size)], cu), values)


@pytest.mark.parametrize("size", [2, 4])
def test_a_padded_batch_is_a_pack_of_its_rows(size):
    values = torch.randn(3, 48, 2)
    cu = zigzag.uniform_cu_seqlens(3, 48)
    for rank in range(size):
        rows = zigzag.shard_rows(values, rank, size)
        assert rows.shape == (3, 48 // size, 2)
        assert torch.equal(rows.flatten(0, 1), zigzag.shard(values.flatten(0, 1), cu, rank, size))


def test_padding_rounds_every_length_up():
    cu = torch.tensor([0, 0, 1, 9, 17], dtype=torch.int32)
    padded_cu = zigzag.pad_cu_seqlens(cu, 8)
    assert padded_cu.tolist() == [0, 0, 8, 16, 24] and padded_cu.dtype == torch.int32
    assert zigzag.pad_cu_seqlens(torch.tensor([0]), 8).tolist() == [0]


def test_gradients_pass_through_a_shard():
    values = torch.randn(16, requires_grad=True)
    zigzag.shard(values, torch.tensor([0, 16]), 1, 2).sum().backward()
    assert values.grad.nonzero().flatten().tolist() == list(range(4, 12))


def test_lengths_that_cannot_be_cut_are_named():
    with pytest.raises(ValueError, match="sequence 1 has 6 tokens.*pad_cu_seqlens"):
        zigzag.run_cu_seqlens(torch.tensor([0, 4, 10]), 2)
    with pytest.raises(ValueError, match="multiple of 8 .*not 12"):
        zigzag.shard_rows(torch.zeros(2, 12), 0, 4)
    with pytest.raises(ValueError, match="start at 0"):
        zigzag.run_cu_seqlens(torch.tensor([4, 8]), 2)

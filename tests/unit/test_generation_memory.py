"""Rows that a GPU's memory holds: counted by hand, and against the cache as it is."""

import pytest
import torch

from megatron_fipo.errors import UserError
from megatron_fipo.model.generation_memory import SAMPLING, free_memory, kv_bytes, row_bytes
from megatron_fipo.rollout.engine import MAX_RUNNING, SamplingParams

V = 93


def test_by_hand():
    """Qwen2.5-32B on 8 ranks: 64 layers, one of 8 key/value heads, 128 wide, in bf16: 32 KiB a token. Its activations:
    four times 5,120 and four times 27,648 / 8 elements."""
    assert kv_bytes(64, 1, 128, 1) == 64 * 2 * 128 * 2 == 32 * 1024
    model = {"vocab_size": 152_064, "activations": 4 * 5_120 + 4 * 3_456}
    row = row_bytes(64, 1, 128, 2_048, 22_528, **model)
    assert row == 66 * 512 * 22_528 + 42 * 152_064 == 767_652_864
    # 40 GB of an H100 are 52 such rows
    assert 40_000_000_000 // row == 52
    # a long prompt with a short answer takes the most while it is read
    assert row_bytes(64, 1, 128, 20_000, 20_100, **model) == 66 * 512 * 20_100 + 20_000 * 34_304 * 2
    assert row_bytes(64, 1, 128, 2_048, 22_528, **model, itemsize=4) == 66 * 1_024 * 22_528 + 42 * 152_064


def test_a_cpu_has_no_limit():
    assert free_memory(torch.device("cpu")) is None


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def chunks(request, build_model, hf_model):
    return build_model(hf_model(request.param, tied=False)[0])


def make_engine(chunks, max_batch=None):
    from megatron_fipo.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(chunks, V, max_batch, pad_id=0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(n): from now on so many bytes are free."""

    def have(free: int) -> None:
        monkeypatch.setattr("megatron_fipo.rollout.embedded.free_memory", lambda device: free)

    return have


@pytest.fixture
def waves(monkeypatch):
    """Rows of each wave, and the bytes of its cache once it is done."""
    from megatron_fipo.rollout.embedded import EmbeddedEngine

    seen, prefill = [], EmbeddedEngine._prefill

    def remembered(self, prompts, *rest):
        rows, logits = prefill(self, prompts, *rest)
        seen.append((len(prompts), rows.cache))
        return rows, logits

    monkeypatch.setattr(EmbeddedEngine, "_prefill", remembered)
    return seen


def test_the_cache_is_what_is_counted(chunks, waves):
    make_engine(chunks, 4).generate([[5] * 10] * 4, [0, 1, 2, 3], SamplingParams(30))
    [(rows, cache)] = waves
    held = sum(tensor.untyped_storage().nbytes() for layer in cache._layers.values() for tensor in layer)
    assert held == rows * kv_bytes(3, 2, 32, 40, itemsize=4)


def test_waves_follow_the_memory(chunks, gpu, waves):
    prompts, seeds, sampling = [[5, 6], [7], [8] * 10, [9] * 4] * 3, range(12), SamplingParams(30)
    whole = make_engine(chunks).generate(prompts, seeds, sampling)
    assert [rows for rows, _ in waves] == [12]
    row = row_bytes(3, 2, 32, 10, 40, vocab_size=V, activations=0, itemsize=4)
    assert row == kv_bytes(5, 2, 32, 40, 4) + SAMPLING * V, "not the prompt's"
    engine = make_engine(chunks)
    for rows in (5, 3, 0):  # a GPU too small for one row is tried all the same
        waves.clear()
        gpu(int(row * rows / 0.9) + 100)
        assert [c.tokens for c in engine.generate(prompts, seeds, sampling)] == [c.tokens for c in whole]
        assert max(count for count, _ in waves) == max(rows, 1) - (rows == 5), "12 rows in 3 waves are 4 each"
    gpu(10**15)
    waves.clear()
    engine.generate([[5]] * (MAX_RUNNING + 2), range(MAX_RUNNING + 2), SamplingParams(1))
    assert [rows for rows, _ in waves] == [MAX_RUNNING // 2 + 1] * 2


def test_more_than_fits_is_refused_with_the_number_that_does(chunks, gpu):
    row = row_bytes(3, 2, 32, 10, 40, vocab_size=V, activations=0, itemsize=4)
    make_engine(chunks, 10**9).check_memory(10, 40)  # a CPU
    gpu(10 * row + 100)
    make_engine(chunks).check_memory(10, 40)
    make_engine(chunks, 10).check_memory(10, 40)
    with pytest.raises(UserError, match="--rollout-max-running 11: so many rows of 40 tokens .* use at most 9, or"):
        make_engine(chunks, 11).check_memory(10, 40)
    gpu(row - 1)
    with pytest.raises(UserError, match="no memory left beside the model to generate 40 tokens"):
        make_engine(chunks).check_memory(10, 40)

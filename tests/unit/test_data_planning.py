"""Who trains on what: every sample exactly once, level packs, equal counts on every replica."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.data.planning import plan_step


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=8, max_size=8 * 12).filter(lambda lengths: len(lengths) % 8 == 0),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(50, 1000),
)
def test_every_plan_keeps_its_promises(lengths, replicas, budget):
    plan = plan_step(lengths, 8, replicas, budget)
    assert len(plan) == len(lengths) // 8
    for number, update in enumerate(plan):
        assert len(update.micro_batches) == replicas
        assert len({len(packs) for packs in update.micro_batches}) == 1, "a replica would miss a collective"
        packs = [pack for packs in update.micro_batches for pack in packs]
        assert all(packs)
        assert sorted(i for pack in packs for i in pack) == list(range(8 * number, 8 * number + 8))
        for pack in packs:
            assert len(pack) == 1 or sum(lengths[i] for i in pack) <= budget or len(packs) + replicas > 8


def test_packs_are_as_few_as_the_budget_allows():
    (update,) = plan_step([100] * 16, 16, replicas=2, max_tokens=400)
    assert [[len(pack) for pack in packs] for packs in update.micro_batches] == [[4, 4], [4, 4]]


def test_a_sequence_beyond_the_budget_gets_a_pack_of_its_own():
    (update,) = plan_step([1000, 10, 10, 10], 4, replicas=1, max_tokens=100)
    assert (0,) in update.micro_batches[0]


def test_replicas_are_level():
    lengths = [7 * (i % 13) + 20 for i in range(64)]
    (update,) = plan_step(lengths, 64, replicas=4, max_tokens=10_000)
    loads = [sum(lengths[i] for pack in packs for i in pack) for packs in update.micro_batches]
    assert max(loads) / min(loads) == pytest.approx(1, abs=0.03)

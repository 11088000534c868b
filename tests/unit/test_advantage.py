"""Advantages by sequence, and those of a step's batches with returns and a KL in the reward."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_fipo.data.advantages import add_advantages
from megatron_fipo.data.packing import pack
from megatron_fipo.data.samples import Sample
from megatron_fipo.loss import AdvantageConfig, group_advantage, overlong_penalty
from megatron_fipo.loss.advantage import GROUP_ADVANTAGES
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout


def test_group_advantage_is_the_formula():
    reward = torch.tensor([1.0, -1.0, -1.0, 0.5, 1.0, -1.0, -1.0])
    groups = torch.tensor([7, 3, 7, 7, 3, 3, 7])
    advantage = group_advantage(reward, groups)
    assert advantage.dtype == torch.float32
    for group in (3, 7):
        own = reward[groups == group].double()
        expected = (own - own.mean()) / (own.std(correction=1) + 1e-6)
        torch.testing.assert_close(advantage[groups == group].double(), expected, rtol=1e-6, atol=1e-6)
        centred = group_advantage(reward, groups, "group-mean")[groups == group].double()
        torch.testing.assert_close(centred, own - own.mean(), rtol=1e-6, atol=1e-6)
        others = [own[torch.arange(len(own)) != i].mean() for i in range(len(own))]
        left_out = group_advantage(reward, groups, "leave-one-out")[groups == group].double()
        torch.testing.assert_close(left_out, own - torch.stack(others), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.1, -0.7])
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("kind", GROUP_ADVANTAGES)
def test_equal_rewards_give_exactly_zero(value, size, kind):
    """Also where the mean of equal numbers is not that number: 3 x 0.1."""
    reward = torch.full((size,), value)
    assert not group_advantage(reward, torch.zeros(size, dtype=torch.long), kind).any()


def test_no_sequences():
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="group_ids"):
        group_advantage(torch.zeros(3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "settings, named",
    [(dict(kind="mean"), "kind"), (dict(gamma=0.0), "gamma"), (dict(kl_weight=-1.0), "kl_weight"),
     (dict(kl_estimator="k4"), "kl_estimator")],
)  # fmt: skip
def test_values_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        AdvantageConfig(**settings)
    with pytest.raises(ValueError, match="kind"):
        group_advantage(torch.zeros(2), torch.zeros(2, dtype=torch.long), "batch")


MASKS = ["0111", "00111011", "01", "0011010", "0110", "000", "0111111"]  # of the tokens; holes, and no response at all
REWARDS = [1.0, -1.0, 0.5, 0.25, -0.75, 2.0, -1.0]


@pytest.fixture
def step(megatron):
    """(updates of packs, rollout, per sample: mask, old and reference log-probs of its positions)."""
    generator, samples, packs = np.random.default_rng(3), [], []
    for i, mask in enumerate(MASKS):
        sample = Sample(
            prompt_id=i, group_id=i // 3, tokens=np.arange(len(mask), dtype=np.int32),
            response_mask=np.array([c == "1" for c in mask]), rollout_logp=np.zeros(len(mask), np.float32),
            finish_reason="stop", weight_versions=(), reward=REWARDS[i], correct=False,
        )  # fmt: skip
        samples.append(sample)
    per_sample = []
    for ids in ([2, 0], [1], [], [3, 6, 4], [5]):
        batch = pack([samples[i] for i in ids], ids, alignment=4)
        old, ref = (torch.tensor(generator.normal(-1, 0.5, len(batch.tokens_T)), dtype=torch.float32) for _ in range(2))
        packs.append(replace(batch, old_logp_T=old, ref_logp_T=ref))
        for i, start in zip(ids, batch.cu_seqlens_padded_S1.tolist(), strict=False):
            own = slice(start, start + len(MASKS[i]) - 1)
            per_sample.append((i, samples[i].response_mask[1:], old[own].tolist(), ref[own].tolist()))
    table = torch.zeros(len(MASKS), 1, 6)
    rollout = Rollout(
        held={}, packed_length_S=torch.ones(7).long(), response_tokens_S=torch.tensor([m.count("1") for m in MASKS]),
        reward_S=torch.tensor(REWARDS), group_ids_S=torch.tensor([0, 0, 0, 1, 1, 1, 2]), table=table,
        kept=tuple(range(7)), visits=tuple(range(7)), batches=1,
    )  # fmt: skip
    return [packs[:2], packs[2:]], rollout, sorted(per_sample, key=lambda item: item[0])


def kl(old: float, ref: float, estimator: str) -> float:
    d = old - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kind", GROUP_ADVANTAGES)
def test_a_kl_in_the_reward_lowers_a_response_by_its_sum(step, kind, estimator):
    updates, rollout, samples = step
    config = AdvantageConfig(kind, kl_weight=0.3, kl_estimator=estimator)
    found, metrics = add_advantages(updates, rollout, config, Replicas.current())
    kl_S = [
        sum(kl(o, r, estimator) for m, o, r in zip(mask, old, ref, strict=True) if m) for _, mask, old, ref in samples
    ]
    reward_S = torch.tensor(REWARDS).double() - 0.3 * torch.tensor(kl_S, dtype=torch.float64)
    expected = group_advantage(reward_S, rollout.group_ids_S, kind)
    for batch in (batch for update in found for batch in update):
        for sample_id, advantage in zip(batch.sample_ids_S.tolist(), batch.advantage.tolist(), strict=True):
            assert advantage == pytest.approx(expected[sample_id].item() if sample_id >= 0 else 0.0, abs=1e-5)
    tokens = sum(m.count("1") for m in MASKS)
    assert metrics["reward/reference_kl"] == pytest.approx(sum(kl_S) / tokens, rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_returns_are_normalised_over_the_tokens_of_the_step(step, gamma, kl_weight):
    updates, rollout, samples = step
    config = AdvantageConfig("batch", gamma=gamma, kl_weight=kl_weight)
    found, metrics = add_advantages(updates, rollout, config, Replicas.current())
    returns = {}
    for i, mask, old, ref in samples:
        rest, rewarded = 0.0, False
        for t in reversed(range(len(mask))):
            reward = 0.0
            if mask[t]:
                reward = -kl_weight * kl(old[t], ref[t], "k1") + (0.0 if rewarded else REWARDS[i])
                rewarded = True
            rest = reward + gamma * rest
            if mask[t]:
                returns[i, t] = rest
    values = torch.tensor(list(returns.values()), dtype=torch.float64)
    mean, std = values.mean().item(), values.std().item()
    seen = 0
    for batch in (batch for update in found for batch in update):
        expected_T = torch.zeros(len(batch.tokens_T))
        for sample_id, start in zip(batch.sample_ids_S.tolist(), batch.cu_seqlens_padded_S1.tolist(), strict=False):
            for t in range(len(MASKS[sample_id]) - 1 if sample_id >= 0 else 0):
                if (sample_id, t) in returns:
                    expected_T[start + t] = (returns[sample_id, t] - mean) / (std + 1e-6)
                    seen += 1
        torch.testing.assert_close(batch.advantage, expected_T, rtol=1e-5, atol=1e-5)
    assert seen == len(returns) == sum(m.count("1") for m in MASKS)
    assert ("reward/reference_kl" in metrics) == (kl_weight > 0)


def test_a_stage_without_log_probs_counts_for_nothing(step):
    """Earlier pipeline stages hold the same batches: their tokens must not enter the sums a second time."""
    updates, rollout, _ = step
    config, replicas = AdvantageConfig("batch", gamma=0.9, kl_weight=0.1), Replicas.current()
    bare = [[replace(batch, old_logp_T=None) for batch in update] for update in updates]
    found, _ = add_advantages([*updates, *bare], rollout, config, replicas)
    alone, _ = add_advantages(updates, rollout, config, replicas)
    for update, expected in zip(found, [*alone, *bare], strict=True):
        for batch, wanted in zip(update, expected, strict=True):
            same = batch.advantage is wanted.advantage is None or torch.equal(batch.advantage, wanted.advantage)
            assert same


def test_overlong_penalty():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480])
    expected = torch.tensor([0.0, 0.0, -1 / 4096, -0.5, -1.0])
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096, 1.0), expected)
    torch.testing.assert_close(overlong_penalty(lengths, 20480, 4096, 0.5), expected / 2)
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(lengths, 100, 0, 1.0)

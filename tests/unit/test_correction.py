"""The importance correction against its formulas, one token at a time in double precision."""

import math

import numpy as np
import pytest
import torch

from megatron_fipo.data.correction import correct_updates
from megatron_fipo.data.packing import pack
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.data.samples import Sample
from megatron_fipo.loss import CorrectionConfig, FipoConfig, correction_metrics, fipo_loss, importance_correction
from megatron_fipo.loss.correction import sequence_log_ratio
from megatron_fipo.observe.step_metrics import _engine_gap, policy_metrics
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout

NAN = float("nan")
LENGTHS = [0, 5, 60, 1, 30, 200, 40]


def make_batch(seed=0, gap=0.3):
    """Log-probs of trainer and engine; the engine is far off in sequence 4, NaN stands outside the response."""
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    tokens = int(cu[-1]) + 3
    old = -3 * torch.rand(tokens, generator=g)
    rollout = old - gap * torch.randn(tokens, generator=g)
    rollout[cu[4] : cu[5]] -= 1.0
    rollout[cu[5] + 7] = old[cu[5] + 7] - 40.0  # exp saturates
    mask = torch.rand(tokens, generator=g) < 0.8
    mask[cu[5] + 7] = True
    inside = mask & (torch.arange(tokens) < cu[-1])
    return torch.where(inside, old, NAN), torch.where(inside, rollout, NAN), mask, cu


def oracle(old, rollout, mask, cu, config):
    """Weight of each response token, in Python floats."""
    weights = {}
    for begin, end in zip(cu[:-1], cu[1:], strict=True):
        log_rho = {t: old[t] - rollout[t] for t in range(begin, end) if mask[t]}
        total = sum(log_rho.values())
        for t, value in log_rho.items():
            rho, weight = math.exp(min(max(value, -20), 20)), 1.0
            if config.token_tis is not None:
                weight = min(rho, config.token_tis)
            if config.sequence_tis is not None:
                weight = min(math.exp(min(max(total, -20), 20)), config.sequence_tis)
            if config.token_band and not config.token_band[0] <= rho <= config.token_band[1]:
                weight = 0.0
            mean = math.exp(total / len(log_rho))
            if config.sequence_mask and not config.sequence_mask[0] <= mean <= config.sequence_mask[1]:
                weight = 0.0
            weights[t] = weight
    return weights


CONFIGS = [
    "token-tis:2",
    "token-tis:0.9",
    "sequence-tis:3",
    "token-band:0.7:1.4",
    "sequence-mask:0.8:1.2",
    "token-tis:1.2 token-band:0.5:inf sequence-mask:0:1.3",
    "sequence-tis:2 sequence-mask:0.9:1.1",
]


@pytest.mark.parametrize("specs", CONFIGS)
def test_against_formulas(specs):
    config = CorrectionConfig.parse(specs.split())
    old, rollout, mask, cu = make_batch()
    expected = oracle(old.tolist(), rollout.tolist(), mask.tolist(), cu.tolist(), config)
    out = importance_correction(old, rollout, mask, cu, config)
    for t, weight in enumerate(out.token_weight_T.tolist()):
        assert weight == pytest.approx(expected.get(t, 1.0), rel=2e-6)
    values = list(expected.values())
    dropped, kept = values.count(0.0), [w for w in values if w]
    metrics = correction_metrics(out.statistics_K)
    assert metrics["correction/dropped_fraction"] == pytest.approx(dropped / len(values))
    assert metrics["correction/weight_mean"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert metrics["correction/effective_fraction"] == pytest.approx(
        sum(kept) ** 2 / sum(w * w for w in kept) / len(values), rel=1e-6
    )
    bound = config.token_tis or config.sequence_tis
    truncated = sum(w == bound for w in kept)
    assert metrics["correction/truncated_fraction"] == pytest.approx(truncated / len(values))
    assert dropped + truncated > 0 and any(w not in (0.0, bound) for w in values)  # else little is proven


def test_nothing_configured_weighs_one():
    old, rollout, mask, cu = make_batch()
    out = importance_correction(old, rollout, mask, cu, CorrectionConfig())
    assert (out.token_weight_T == 1).all()
    assert correction_metrics(out.statistics_K) == {
        "correction/dropped_fraction": 0.0,
        "correction/truncated_fraction": 0.0,
        "correction/weight_mean": 1.0,
        "correction/effective_fraction": 1.0,
    }


@pytest.mark.parametrize("specs", CONFIGS)
def test_parts_of_sequences_give_the_whole(specs):
    """Cut every sequence in two, as context parallelism does: with the sums of whole sequences nothing changes."""
    config = CorrectionConfig.parse(specs.split())
    old, rollout, mask, cu = make_batch()
    whole = importance_correction(old, rollout, mask, cu, config)
    total_2S = sequence_log_ratio(old, rollout, mask, cu)
    halves = torch.stack([cu[:-1], (cu[:-1] + cu[1:]) // 2], dim=1)
    cu_halves = torch.cat([halves.flatten(), cu[-1:]])
    sums = sequence_log_ratio(old, rollout, mask, cu_halves).view(2, -1, 2).sum(-1)
    assert torch.allclose(sums, total_2S, rtol=1e-12)
    parts = importance_correction(
        old, rollout, mask, cu_halves, config, log_ratio_2S=total_2S.repeat_interleave(2, dim=1)
    )
    assert torch.equal(parts.token_weight_T, whole.token_weight_T)
    assert torch.allclose(parts.statistics_K, whole.statistics_K, rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_dropped_tokens_stay_in_the_future_kl(backend):
    """The influence weights do not know the correction; the dropped tokens' own loss and gradient are gone."""
    old, rollout, mask, cu = make_batch()
    inside = mask & (torch.arange(mask.shape[0]) < cu[-1])
    logp = old + torch.where(inside, 0.02, 0.0)
    advantage, config = torch.ones(len(LENGTHS)), FipoConfig(weight_low=0.5, weight_high=3.0)
    weight_T = importance_correction(
        old, rollout, mask, cu, CorrectionConfig.parse(["token-band:0.7:1.4"])
    ).token_weight_T
    plain = fipo_loss(logp, old, advantage, mask, cu, config, backend=backend)
    leaf = logp.clone().requires_grad_()
    out = fipo_loss(leaf, old, advantage, mask, cu, config, token_weight_T=weight_T, backend=backend)
    out.loss_sum.backward()
    dropped = inside & (weight_T == 0)
    assert 0 < dropped.sum() < inside.sum() and (plain.weights_T[inside] != 1).any()
    assert torch.equal(out.weights_T, plain.weights_T)
    assert not leaf.grad[dropped].any() and (leaf.grad[inside & ~dropped] != 0).all()
    assert out.denominator == (inside & ~dropped).sum()


@pytest.mark.parametrize(
    "specs, message",
    [
        (["tis:2"], "'tis:2' is none of"),
        (["token-tis"], "'token-tis' is none of"),
        (["token-band:2"], "'token-band:2' is none of"),
        (["sequence-mask:a:2"], "'sequence-mask:a:2' is none of"),
        (["token-tis:nan"], "'token-tis:nan' is none of"),
        (["token-tis:2", "sequence-tis:2"], "give one of them"),
        (["token-tis:0"], "not at 0"),
        (["token-band:1.5:2"], "not from 1.5 to 2"),
        (["sequence-mask:0.5:0.9"], "not from 0.5 to 0.9"),
    ],
)
def test_mistakes_are_named(specs, message):
    with pytest.raises(ValueError, match=message):
        CorrectionConfig.parse(specs)


def packed(lengths, first, rollout_gap):
    """A pack of samples numbered from `first`, two of a group, whose trainer log-probs are all -1."""
    samples = [
        Sample(
            prompt_id=0, group_id=(first + i) // 2, tokens=np.arange(n + 1, dtype=np.int32),
            response_mask=np.arange(n + 1) > 0, rollout_logp=np.full(n + 1, -1.0, np.float32), finish_reason="stop",
            weight_versions=(), reward=0.0, correct=False,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    ids = range(first, first + len(lengths))
    batch = pack(samples, list(ids), torch.zeros(len(lengths)), torch.ones(len(lengths)))
    return batch.with_old_logp(batch.rollout_logp_T + torch.tensor(rollout_gap))


@pytest.mark.parametrize("normalization", ["token", "group", "sequence"])
def test_batches_get_weights_and_scales_of_what_is_left(megatron, normalization):
    """Two updates of two packs each; the second sample loses two of three tokens, the last one all."""
    updates = [
        [packed([2, 3], 0, [0, 0, 0, 1.0, 1.0]), packed([1, 1], 2, [0, 0])],
        [packed([2], 4, [0.0, 0.0]), packed([2], 5, [1.0, -1.0])],
    ]
    loss, replicas = FipoConfig(normalization=normalization), Replicas.current()
    config = CorrectionConfig.parse(["token-band:0.9:1.1"])
    plan = [UpdatePlan((((0, 1), (2, 3)),)), UpdatePlan((((4,), (5,)),))]
    numbers_S = torch.ones(6, dtype=torch.int64)
    rollout = Rollout(
        held={}, packed_length_S=numbers_S, response_tokens_S=numbers_S, reward_S=numbers_S.float(),
        group_ids_S=torch.arange(6) // 2, table=torch.zeros(3, 2, 6), kept=(0, 1, 2), visits=(0, 1, 2), batches=1,
    )  # fmt: skip
    corrected, metrics = correct_updates(updates, plan, rollout, config, loss, replicas)
    weights = [batch.token_weight_T.tolist() for update in corrected for batch in update]
    assert weights == [[1, 1, 1, 0, 0], [1, 1], [1, 1], [0, 0]]
    assert metrics["correction/dropped_fraction"] == pytest.approx(4 / 11)
    scales = [scale for update in corrected for batch in update for scale in batch.loss_scale_S.tolist()]
    # two groups of 3 and 2 tokens left, four responses; then one group of 2 tokens left, one response
    assert (
        scales
        == {
            "token": [1] * 6,
            "group": pytest.approx([1 / 6, 1 / 6, 1 / 4, 1 / 4, 1 / 2, 0]),
            "sequence": pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 0]),
        }[normalization]
    )
    assert correct_updates(updates, plan, rollout, CorrectionConfig(), loss, replicas) == (updates, {})


def test_the_gap_between_engine_and_trainer_is_measured(megatron):
    gap = [0.0, 0.001, -0.002, 0.5, 0.01]
    batch = packed([5], 0, gap)
    metrics = policy_metrics([batch], torch.tensor(10.0, dtype=torch.float64), FipoConfig(), Replicas.current())
    assert metrics["mismatch/kl"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gap) / 5, rel=1e-5)
    assert metrics["mismatch/rms"] == pytest.approx(math.sqrt(sum(g * g for g in gap) / 5), rel=1e-5)
    assert metrics["mismatch/median"] == pytest.approx(0.002, rel=2e-3)
    assert metrics["mismatch/p99"] == pytest.approx(0.01, rel=2e-3)  # the fourth of five, not interpolated
    assert metrics["mismatch/max"] == pytest.approx(0.5)
    assert metrics["actor/entropy"] == 2.0


def test_samples_of_earlier_weights_are_no_mismatch(megatron):
    """Whole, and in the shares of two context-parallel ranks; the entropy counts all tokens."""
    gap = [0.5] * 4 + [0.001 * i for i in range(1, 9)] + [0.7] * 4
    batch = packed([4, 8, 4], 0, gap)
    replicas, entropy = Replicas.current(), torch.tensor(32.0, dtype=torch.float64)
    metrics = policy_metrics([batch], entropy, FipoConfig(), replicas, stale_samples=1)
    fresh = gap[4:]
    assert metrics["mismatch/rms"] == pytest.approx(math.sqrt(sum(g * g for g in fresh) / 12), rel=1e-5)
    assert metrics["actor/entropy"] == 2.0
    shares = [_engine_gap(batch.shard(rank, 2), 2, 2) for rank in (0, 1)]
    assert torch.cat(shares).tolist() == pytest.approx([0.7] * 4, rel=1e-6)
    all_stale = policy_metrics([batch], entropy, FipoConfig(), replicas, stale_samples=3)
    assert all_stale["mismatch/max"] == 0.0 and all_stale["actor/entropy"] == 2.0

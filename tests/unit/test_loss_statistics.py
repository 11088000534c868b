"""Statistics merge exactly: any split of a mini-batch gives the loss, gradient and metrics of the whole."""

import math

import pytest
import torch

from megatron_fipo.loss import FipoConfig, LossStatistics, fipo_loss, loss_scale
from megatron_fipo.loss.metrics import QUANTILES

LENGTHS = [50, 0, 300, 7, 120, 1, 90, 33]
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def make_batch(spread=0.3):
    g = torch.Generator().manual_seed(5)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    logp = -2 * torch.rand(int(cu[-1]), generator=g)
    step = spread * torch.randn(int(cu[-1]), generator=g)
    step[::41] += 2.5
    advantage = torch.randn(len(LENGTHS), generator=g)
    advantage[2], advantage[4] = -0.8, 0.6  # the sequence filter drops the first of them
    mask = torch.rand(int(cu[-1]), generator=g) < 0.9
    return logp, logp - step, advantage, mask, cu


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("normalization", ["token", "group", "sequence"])
@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 2, 5, 8], [0, 3, 3, 8]])
def test_micro_batches_add_up(cuts, normalization, backend):
    cfg = FipoConfig(normalization=normalization, weight_low=0.8, dual_clip=4.0, safety_threshold=3.0)
    logp, old, advantage, mask, cu = make_batch()
    whole_leaf = logp.clone().requires_grad_()
    whole = fipo_loss(whole_leaf, old, advantage, mask, cu, cfg, group_ids_S=GROUPS, backend=backend)
    whole.loss.backward()

    tokens_S = torch.stack([mask[a:b].sum() for a, b in zip(cu[:-1], cu[1:], strict=True)])
    scale_S = loss_scale(normalization, tokens_S, GROUPS)
    leaf, total, kept, merged = logp.clone().requires_grad_(), 0.0, 0.0, LossStatistics.empty()
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        part = slice(int(cu[first]), int(cu[last]))
        out = fipo_loss(
            leaf[part], old[part], advantage[first:last], mask[part], cu[first : last + 1] - cu[first], cfg,
            loss_scale_S=scale_S[first:last], backend=backend,
        )  # fmt: skip
        out.loss_sum.backward()
        total, kept = total + out.loss_sum.item(), kept + out.denominator.item()
        merged = LossStatistics.merge(merged, out.statistics)
    denominator = kept if normalization == "token" else 1.0
    assert total / denominator == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(leaf.grad / denominator, whole_leaf.grad, rtol=1e-5, atol=1e-9)
    assert whole.denominator == (kept if normalization == "token" else 1)

    expected, seen = whole.metrics, merged.metrics()
    assert expected.keys() == seen.keys() and len(expected) == 29
    for name, value in expected.items():
        if name.removeprefix("actor/") in QUANTILES:
            bound = 0.0014 * math.hypot(math.log(value), 1e-3)
            assert abs(math.log(seen[name] / value)) <= bound, name
        else:
            assert seen[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert merged.metrics() == pytest.approx(whole.statistics.metrics(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "cfg",
    [
        FipoConfig(),
        FipoConfig(weight_low=0.0, weight_high=10.0),
        FipoConfig(weight_low=0.9, weight_high=1.1, dual_clip=4.5, safety_threshold=1.3),
        FipoConfig(semantics="paper", weight_low=0.0, weight_high=float("inf"), safety_threshold=2.0),
    ],
)
def test_the_operator_counts_what_plain_torch_counts(cfg):
    for spread in (0.3, 3.0):
        logp, old, advantage, mask, cu = make_batch(spread)
        plain, fused = (
            fipo_loss(logp, old, advantage, mask, cu, cfg, group_ids_S=GROUPS, backend=backend).token_statistics_K
            for backend in ("torch", "compiled")
        )
        torch.testing.assert_close(fused, plain, rtol=2e-6, atol=1e-7)


def test_the_filter_drops_numerator_and_denominator():
    """The batch above has a response with several dual-clipped tokens; without the filter the numbers differ."""
    logp, old, advantage, mask, cu = make_batch()
    kept, unfiltered = (
        fipo_loss(logp, old, advantage, mask, cu, FipoConfig(dual_clip=4.0, sequence_filter=choice))
        for choice in (True, False)
    )
    assert unfiltered.denominator == mask.sum() > kept.denominator > 0
    assert kept.loss != unfiltered.loss
    scaled = fipo_loss(logp, old, advantage, mask, cu, FipoConfig(dual_clip=4.0, normalization="sequence"))
    assert scaled.denominator == 1


def test_exact_quantiles_are_those_of_torch():
    logp, old, advantage, mask, cu = make_batch()
    out = fipo_loss(logp, old, advantage, mask, cu, FipoConfig())
    ratio = (logp - old).double().exp()
    per_token = advantage.repeat_interleave(torch.tensor(LENGTHS))
    for name, (sign, q) in QUANTILES.items():
        chosen = ratio[mask & (per_token < 0 if sign == "negative" else per_token > 0)]
        assert out.metrics[f"actor/{name}"] == pytest.approx(torch.quantile(chosen, q).item(), rel=1e-6), name


def test_on_policy_quantiles_are_exactly_one():
    logp, _, advantage, mask, cu = make_batch()
    statistics = fipo_loss(logp, logp.clone(), advantage, mask, cu, FipoConfig()).statistics
    merged = LossStatistics.merge(statistics, LossStatistics.empty()).metrics()
    assert all(merged[f"actor/{name}"] == 1.0 for name in QUANTILES)
    assert merged["fipo/active_fraction"] == 0.0 and merged["actor/ppo_kl"] == 0.0


def test_one_sign_of_advantage_leaves_the_other_at_zero():
    logp, old, advantage, mask, cu = make_batch()
    metrics = fipo_loss(logp, old, advantage.abs(), mask, cu, FipoConfig()).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(value == 0 for name, value in metrics.items() if "neg_" in name)
    assert metrics["actor/pos_is_min"] > 0


def test_range_0_10_reports_no_clipping():
    logp, old, advantage, mask, cu = make_batch(spread=1.0)
    for cfg in (FipoConfig(weight_low=0.0, weight_high=10.0), FipoConfig(weight_low=0.1, weight_high=10.0)):
        metrics = fipo_loss(logp, old, advantage, mask, cu, cfg).metrics
        clipped = metrics["actor/IW_overall_clip_ratio"]
        assert clipped == metrics["actor/IW_upper_clip_ratio"] + metrics["actor/IW_lower_clip_ratio"]
        assert (clipped > 0) == (cfg.weight_low > 0)


def test_reduction_in_place_over_ranks():
    """The tensors of a rank can be all-reduced as they are: SUM, MIN, MAX."""
    logp, old, advantage, mask, cu = make_batch()
    out = fipo_loss(logp.requires_grad_(), old, advantage, mask, cu, FipoConfig())
    statistics, empty = out.statistics, LossStatistics.empty()
    for tensor, other, reduce in (
        (statistics.sums, empty.sums, torch.add),
        (statistics.histograms, empty.histograms, torch.add),
        (statistics.minima, empty.minima, torch.minimum),
        (statistics.maxima, empty.maxima, torch.maximum),
    ):
        assert tensor.is_contiguous() and not tensor.requires_grad
        assert torch.equal(reduce(tensor, other), tensor)

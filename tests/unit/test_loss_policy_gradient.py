"""GRPO, GSPO, CISPO and REINFORCE++'s clipped ratio, KL and entropy bonus against their formulas, a token at a time."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loss_oracle import GROUPS, LENGTHS, NAN, make_batch

from megatron_fipo.loss import FipoConfig, LossConfig, RatioConfig, fipo_loss, ratio_loss, with_penalties
from megatron_fipo.loss.kl import kl_estimate

POLICIES = {
    "grpo": FipoConfig.clipped_ratio(0.2, 0.2, "sequence"),
    "reinforce++": FipoConfig.clipped_ratio(0.2, 0.2, "token"),
    "gspo": RatioConfig("gspo", 0.03, 0.04, "sequence"),
    "cispo": RatioConfig("cispo", 1.0, 0.4, "token"),
    "cispo with a lower bound": RatioConfig("cispo", 0.3, 4.0, "group"),
}


def kl_and_slope(d: float, estimator: str) -> tuple[float, float]:
    inside = abs(d) <= 20
    d = min(max(d, -20.0), 20.0)
    value, slope = {"k1": (d, 1.0), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}[estimator]
    return value, slope * inside


def oracle(name, logp, old, advantage_T, mask, cu, cfg, *, groups, weight=None, ref=None, entropy=None):
    """Python floats only: the loss, its gradients in logp and entropy, the share of clipped tokens, the mean KL."""
    low, high = 1 - cfg.policy.clip_low, 1 + cfg.policy.clip_high
    responses = [[t for t in range(a, b) if mask[t]] for a, b in zip(cu[:-1], cu[1:], strict=True)]
    counted = [[t for t in own if weight is None or weight[t] != 0] for own in responses]
    normalization = cfg.resolved_normalization
    tokens = sum(map(len, responses))
    total, grad, entropy_grad, clipped, kl_sum = 0.0, [0.0] * len(logp), [0.0] * len(logp), 0, 0.0
    for s, own in enumerate(responses):
        if not counted[s]:
            scale = 0.0
        elif normalization == "token":
            scale = 1 / sum(map(len, counted))
        elif normalization == "sequence":
            scale = 1 / (len(counted[s]) * sum(1 for r in counted if r))
        else:
            of_group = sum(len(r) for r, g in zip(counted, groups, strict=True) if g == groups[s])
            scale = 1 / (of_group * len({g for r, g in zip(counted, groups, strict=True) if r}))
        for t in own:
            a = advantage_T[t]
            r = math.exp(min(max(logp[t] - old[t], -20.0), 20.0))
            if name == "gspo":
                r = math.exp(sum(logp[i] - old[i] for i in own) / len(own))
            if name.startswith("cispo"):
                r, outside = min(max(r, low), high), r < low or r > high
                loss, g = -r * a * logp[t], -r * a
            else:
                outside = (a < 0 and r < low) or (a > 0 and r > high)
                loss, g = max(-a * r, -a * min(max(r, low), high)), 0.0 if outside else -a * r
                if name != "gspo" and abs(logp[t] - old[t]) > 20:
                    g = 0.0
            clipped += outside
            w = 1.0 if weight is None else weight[t]
            if cfg.kl_weight:
                kl, slope = kl_and_slope(logp[t] - ref[t], cfg.kl_estimator)
                loss, g, kl_sum = loss + cfg.kl_weight * kl, g + cfg.kl_weight * slope, kl_sum + kl
            if cfg.entropy_weight:
                loss -= cfg.entropy_weight * entropy[t]
                entropy_grad[t] = -cfg.entropy_weight * w * scale
            total += w * scale * loss
            grad[t] = w * scale * g
    return total, grad, entropy_grad, clipped / max(tokens, 1), kl_sum / max(tokens, 1)


def computed(logp, old, advantage, mask, cu, cfg, *, groups, weight=None, ref=None, entropy=None, backend="torch"):
    """The same by the package; entropies are a leaf of their own."""
    leaf = logp.clone().requires_grad_()
    entropy = None if entropy is None else entropy.clone().requires_grad_()
    extra = dict(group_ids_S=torch.tensor(groups), token_weight_T=weight)
    if isinstance(cfg.policy, FipoConfig):
        out = fipo_loss(leaf, old, advantage, mask, cu, cfg.policy, **extra, backend=backend)
    else:
        out = ratio_loss(leaf, old, advantage, mask, cu, cfg.policy, **extra)
    policy_loss = out.loss.item()
    out = with_penalties(out, leaf, cfg, ref_logp_T=ref, entropy_T=entropy, token_weight_T=weight)
    out.loss.backward()
    return out, policy_loss, leaf.grad, None if entropy is None else entropy.grad


@pytest.mark.parametrize("estimator", [None, "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalization", ["token", "group", "sequence"])
@pytest.mark.parametrize("name", POLICIES)
def test_against_formulas(name, normalization, weighted, estimator):
    """Prompts, holes, empty sequences, a sequence without response, NaN and inf wherever no response is."""
    policy = POLICIES[name]
    fields = {k: getattr(policy, k) for k in ("clip_low", "clip_high")} | {"normalization": normalization}
    policy = (
        FipoConfig.clipped_ratio(**fields) if isinstance(policy, FipoConfig) else RatioConfig(policy.kind, **fields)
    )
    cfg = LossConfig(policy, kl_weight=0.3 * bool(estimator), kl_estimator=estimator or "k3", entropy_weight=0.1)
    logp, old, advantage, mask, cu, weight = make_batch()
    weight = weight if weighted else None
    generator = torch.Generator().manual_seed(5)
    ref = torch.where(logp.isfinite(), logp + 0.5 * torch.randn(logp.shape, generator=generator), NAN)
    ref[cu[8] + 31] -= 40.0  # d is clamped
    entropy = torch.where(mask, torch.rand(logp.shape, generator=generator), NAN)
    # one value for each token: REINFORCE++ has returns
    per_token = torch.cat([advantage.repeat_interleave(torch.tensor(LENGTHS)), torch.full((5,), NAN)])
    per_token = per_token * (1 + 0.1 * torch.arange(len(per_token)) % 3)
    kept = {"ref": ref, "entropy": entropy} | ({"weight": weight} if weighted else {})
    expected = oracle(
        name, logp.tolist(), old.tolist(), per_token.tolist(), mask.tolist(), cu.tolist(), cfg, groups=GROUPS,
        **{key: values.tolist() for key, values in kept.items()},
    )  # fmt: skip
    runs = [(torch.float64, "torch"), (torch.float32, "torch")]
    runs += [(torch.float32, "compiled")] * isinstance(policy, FipoConfig)
    for dtype, backend in runs:
        out, _, grad, entropy_grad = computed(
            logp.to(dtype), old.to(dtype), per_token.to(dtype), mask, cu, cfg, groups=GROUPS, backend=backend,
            **{key: values.to(dtype) for key, values in kept.items()},
        )  # fmt: skip
        tolerance = 2e-5 if dtype == torch.float32 else 1e-6  # the batch itself is fp32
        assert out.loss.item() == pytest.approx(expected[0], rel=tolerance)
        for found, wanted in ((grad, expected[1]), (entropy_grad, expected[2])):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max() > 0
        metrics = out.statistics.metrics_of(cfg)
        assert metrics["actor/pg_clipfrac"] == pytest.approx(expected[3]) and 0 < expected[3] < 1
        assert metrics.get("actor/reference_kl", 0.0) == pytest.approx(expected[4], rel=1e-4)
        assert not any(word in key for key in metrics for word in ("influence", "fipo", "lower", "with_f"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    name=st.sampled_from(list(POLICIES)),
    kl=st.sampled_from([("k3", 0.0), ("k3", 0.5), ("k2", 0.5)]),
    entropy_weight=st.sampled_from([0.0, 0.2]),
)
def test_random_batches(lengths, seed, name, kl, entropy_weight):
    """Log-ratios lie on a grid of 1/64, exact in fp32."""
    cfg = LossConfig(POLICIES[name], kl_weight=kl[1], kl_estimator=kl[0], entropy_weight=entropy_weight)
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tokens = int(cu[-1])
    logp = torch.randint(-256, 1, (tokens,), generator=g) / 64
    old, ref = (logp - torch.randint(-20, 21, (tokens,), generator=g) / 64 for _ in range(2))
    advantage = torch.randint(-4, 5, (len(lengths),), generator=g) / 2
    mask, entropy = torch.rand(tokens, generator=g) < 0.8, torch.rand(tokens, generator=g)
    groups = [s // 2 for s in range(len(lengths))]
    loss, grad, *_ = oracle(
        name, logp.tolist(), old.tolist(), advantage.repeat_interleave(torch.tensor(lengths)).tolist(), mask.tolist(),
        cu.tolist(), cfg, groups=groups, ref=ref.tolist(), entropy=entropy.tolist(),
    )  # fmt: skip
    out, _, found, _ = computed(logp, old, advantage, mask, cu, cfg, groups=groups, ref=ref, entropy=entropy)
    size = max(max((abs(x) for x in grad), default=0.0) * tokens, abs(loss))
    assert abs(out.loss.item() - loss) <= 2e-5 * size + 1e-7
    if tokens:
        assert (found - torch.tensor(grad, dtype=torch.float64)).abs().max() <= 2e-5 * size + 1e-9


def test_the_policy_loss_is_logged_without_penalties():
    logp, old, advantage, mask, cu, _ = make_batch()
    cfg = LossConfig(FipoConfig(), kl_weight=0.5, entropy_weight=0.1)
    entropy = torch.ones_like(logp)
    out, policy_loss, *_ = computed(logp, old, advantage, mask, cu, cfg, groups=GROUPS, ref=old, entropy=entropy)
    assert out.statistics.metrics()["actor/pg_loss"] == pytest.approx(policy_loss) != pytest.approx(out.loss.item())


def test_what_the_filter_drops_has_no_penalty_either():
    """The batch has a response with several tokens beyond c."""
    logp, old, advantage, mask, cu, _ = make_batch()
    ref = old.clone()
    results = []
    for shift in (0.0, 5.0):
        ref[cu[3] : cu[4]] = old[cu[3] : cu[4]] + shift
        cfg = LossConfig(FipoConfig(), kl_weight=0.5)
        out, _, grad, _ = computed(logp, old, advantage, mask, cu, cfg, groups=GROUPS, ref=ref, backend="compiled")
        results.append((out.loss.item(), grad))
        assert not grad[cu[3] : cu[4]].any() and grad.any()
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_gspo_equals_grpo_where_all_ratios_of_a_response_are_equal():
    """s is then the ratio itself."""
    cu, mask = torch.tensor([0, 3, 8]), torch.ones(8, dtype=torch.bool)
    old, advantage = -torch.rand(8, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, -0.5])
    logp = old + torch.tensor([0.1, -0.15]).repeat_interleave(torch.tensor([3, 5]))
    results = [
        computed(logp, old, advantage, mask, cu, LossConfig(policy), groups=[0, 1])
        for policy in (RatioConfig("gspo", 0.2, 0.2, "sequence"), FipoConfig.clipped_ratio(0.2, 0.2, "sequence"))
    ]
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][2], results[1][2])


def test_estimators_of_the_kl_estimate_it():
    """Two distributions over 5 tokens, all of them weighted by their probability: values and gradients are exact."""
    generator = torch.Generator().manual_seed(2)
    logits, ref = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    ref_logp = ref.log_softmax(0)
    everywhere = torch.ones(5, dtype=torch.bool)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    kl = (logp.exp() * (logp - ref_logp)).sum()
    reverse = (ref_logp.exp() * (ref_logp - logp)).sum()
    value = {k: (p * kl_estimate(logp, ref_logp, everywhere, k)).sum() for k in ("k1", "k2", "k3")}
    assert value["k1"].item() == pytest.approx(kl.item()) == pytest.approx(value["k3"].item())
    torch.testing.assert_close(gradient(value["k1"]), torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(gradient(value["k2"]), gradient(kl))
    torch.testing.assert_close(gradient(value["k3"]), gradient(reverse))


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: RatioConfig("ppo", 0.2, 0.2, "token"), "kind"),
        (lambda: RatioConfig("gspo", 1.1, 0.2, "token"), "clip_low"),
        (lambda: RatioConfig("gspo", 0.2, math.inf, "token"), "clip_high"),
        (lambda: RatioConfig("gspo", 0.2, 0.2, "batch"), "normalization"),
        (lambda: LossConfig(kl_weight=-1.0), "kl_weight"),
        (lambda: LossConfig(kl_weight=0.1, kl_estimator="k4"), "kl_estimator"),
        (lambda: LossConfig(kl_weight=0.1, kl_estimator="k1"), "k1 has no gradient"),
        (lambda: LossConfig(entropy_weight=NAN), "entropy_weight"),
    ],
)
def test_values_out_of_range_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_what_a_penalty_needs_is_named():
    logp, old, advantage, mask, cu, _ = make_batch()
    for cfg, named in ((LossConfig(kl_weight=0.1), "ref_logp_T"), (LossConfig(entropy_weight=0.1), "entropy_T")):
        with pytest.raises(ValueError, match=named):
            computed(logp, old, advantage, mask, cu, cfg, groups=GROUPS)

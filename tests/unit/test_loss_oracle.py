"""Both backends against the formulas, one token at a time in double precision."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.loss import FipoConfig, fipo_loss

NAN, INF = float("nan"), float("inf")


def oracle(logp, old, advantage_T, mask, cu, cfg, *, groups=None, token_weight=None):
    """Python floats only. Returns loss, gradient and f by token, and the branches seen."""
    gamma = 2.0 ** (-1.0 / cfg.half_life)
    paper = cfg.semantics == "paper"
    normalization = cfg.normalization or ("group" if paper else "token")
    filtered = (not paper) if cfg.sequence_filter is None else cfg.sequence_filter
    total, grad, f_T = 0.0, [0.0] * len(logp), [None] * len(logp)
    seen = set()
    responses = [[t for t in range(a, b) if mask[t]] for a, b in zip(cu[:-1], cu[1:], strict=True)]
    scales = []
    # what a correction drops by weight 0 counts in no denominator
    counted = [[t for t in own if token_weight is None or token_weight[t] != 0] for own in responses]
    for s, own in enumerate(counted):
        if normalization == "token" or not own:
            scales.append(1.0)
        elif normalization == "sequence":
            scales.append(1.0 / (len(own) * sum(1 for r in counted if r)))
        else:
            tokens = sum(len(r) for r, g in zip(counted, groups, strict=True) if g == groups[s])
            used = {g for r, g in zip(counted, groups, strict=True) if r}
            scales.append(1.0 / (tokens * len(used)))
    kept = 0
    for s in range(len(responses)):
        future, beyond, loss_s, grads = 0.0, 0, 0.0, {}
        for t in range(cu[s + 1] - 1, cu[s] - 1, -1):
            if not mask[t]:
                future *= gamma
                continue
            raw = logp[t] - old[t]
            d = min(max(raw, -20.0), 20.0)
            r, a = math.exp(d), advantage_T[t]
            future = (d if r <= cfg.dual_clip else 0.0) + gamma * future
            seen.add("filtered" if r > cfg.dual_clip else "summed")
            f = min(max(math.exp(min(max(future, -80), 80)), cfg.weight_low), cfg.weight_high)
            if a < 0 and r > cfg.safety_threshold:
                seen.add("safety")
                f = 1.0 if paper else min(max(f, 0.8), 1.0)
            f_T[t] = f
            w = a * f
            clipped = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
            l1, l2 = -w * r, -w * clipped
            loss = max(l1, l2)
            g = l1 if (a > 0 and r <= 1 + cfg.clip_high) or (a < 0 and r >= 1 - cfg.clip_low) else 0.0
            if a != 0:
                seen.add(("clipped" if g == 0 else "unclipped", a > 0))
            if a < 0 and max(r, clipped) > cfg.dual_clip:
                beyond += 1
                if not paper:
                    seen.add("dual")
                    loss, g = -w * cfg.dual_clip, 0.0
            if abs(raw) > 20:
                seen.add("clamped")
                g = 0.0
            tw = token_weight[t] if token_weight is not None else 1.0
            loss_s += loss * tw
            grads[t] = g * tw
        if filtered and beyond > 1:
            seen.add("dropped")
            continue
        kept += len(counted[s])
        total += loss_s * scales[s]
        for t, g in grads.items():
            grad[t] = g * scales[s]
    denominator = max(kept, 1) if normalization == "token" else 1
    return total / denominator, [g / denominator for g in grad], f_T, seen


LENGTHS = [0, 1, 7, 40, 0, 23, 130, 1, 64, 9, 50]
GROUPS = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def make_batch(seed=0):
    """Prompts, holes in the responses, log-ratios beyond every threshold, and NaN or inf wherever no response is."""
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    tokens = int(cu[-1]) + 5
    logp = -3 * torch.rand(tokens, generator=g)
    step = 0.3 * torch.randn(tokens, generator=g)
    tail = torch.rand(tokens, generator=g)
    step = torch.where(tail < 0.06, step * 6, step)
    step = torch.where(tail > 0.98, torch.where(tail > 0.99, 2.6, -25.0), step)
    old = logp - step
    mask = torch.rand(tokens, generator=g) < 0.85
    for s in range(len(LENGTHS)):
        mask[cu[s] : cu[s] + (LENGTHS[s] // 4)] = False
    mask[cu[9] : cu[10]] = False  # a sequence without response tokens
    old[cu[3] + 20 : cu[3] + 24] = logp[cu[3] + 20 : cu[3] + 24] - 3.0  # several tokens beyond c, A < 0: dropped
    mask[cu[3] + 20 : cu[3] + 24] = True
    advantage = torch.randn(len(LENGTHS), generator=g)
    advantage[3], advantage[6], advantage[8] = -1.0, 0.7, -0.4
    advantage[5] = 0.0
    old[cu[8] + 30] = logp[cu[8] + 30] + 30.0  # d is clamped
    mask[cu[8] + 30] = True
    padding = torch.tensor([NAN, INF, -INF])[torch.randint(3, (tokens,), generator=g)]
    mask[cu[-1] :] = True  # past the end: no token of any sequence
    outside = ~mask | (torch.arange(tokens) >= cu[-1])
    token_weight = 2 * torch.rand(tokens, generator=g)
    token_weight[token_weight < 0.2] = 0.0  # dropped
    token_weight[cu[8] : cu[9]] = 0.0  # as a whole
    return (
        torch.where(outside, padding, logp),
        torch.where(outside, padding.flip(0), old),
        advantage,
        mask,
        cu,
        torch.where(outside, NAN, token_weight),
    )


CONFIGS = [
    FipoConfig(),
    FipoConfig.preset("fipo-7b"),
    FipoConfig.preset("dapo"),
    FipoConfig(weight_low=0.0, weight_high=10.0, half_life=4.0),
    FipoConfig(weight_low=0.8, weight_high=1.2, safety_threshold=4.0, dual_clip=3.0, half_life=128.0),
    FipoConfig(semantics="paper", weight_low=0.8, safety_threshold=2.0),
    FipoConfig(semantics="paper", weight_low=0.0, weight_high=INF, half_life=3.0, sequence_filter=True),
    FipoConfig(semantics="paper", weight_low=0.0, weight_high=INF, half_life=INF, safety_threshold=1.5),
]


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("normalization", [None, "token", "group", "sequence"])
@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("weighted", [False, True])
def test_against_formulas(cfg, normalization, weighted, backend):
    cfg = replace(cfg, normalization=normalization)
    logp, old, advantage, mask, cu, token_weight = make_batch()
    token_weight = token_weight if weighted else None
    per_token = torch.cat([advantage.repeat_interleave(torch.tensor(LENGTHS)), torch.full((5,), NAN)])
    expected_loss, expected_grad, expected_f, _ = oracle(
        logp.tolist(), old.tolist(), per_token.tolist(), mask.tolist(), cu.tolist(), cfg, groups=GROUPS,
        token_weight=token_weight.tolist() if weighted else None,
    )  # fmt: skip
    grads = []
    for adv, offsets in ((advantage, cu), (per_token, cu.long())):
        leaf = logp.clone().requires_grad_()
        out = fipo_loss(
            leaf, old, adv, mask, offsets, cfg,
            group_ids_S=torch.tensor(GROUPS), token_weight_T=token_weight, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
        grad = torch.tensor(expected_grad, dtype=torch.float64)
        assert leaf.grad.isfinite().all()
        assert (leaf.grad - grad).abs().max() <= 1e-5 * grad.abs().max()
        assert all(f is None or out.weights_T[t].item() == pytest.approx(f, rel=3e-5) for t, f in enumerate(expected_f))
        assert all(math.isfinite(value) for value in out.metrics.values())
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-6, atol=2e-6 * float(grads[0].abs().max()))


def test_the_batch_crosses_every_threshold():
    """Guards the test above: without these branches it would prove little."""
    logp, old, advantage, mask, cu, _ = make_batch()
    per_token = torch.cat([advantage.repeat_interleave(torch.tensor(LENGTHS)), torch.zeros(5)])
    *_, seen = oracle(*(x.tolist() for x in (logp, old, per_token, mask, cu)), FipoConfig(safety_threshold=3.0))
    branches = {(clip, positive) for clip in ("clipped", "unclipped") for positive in (True, False)}
    assert seen >= branches | {"filtered", "summed", "safety", "dual", "clamped", "dropped"}


@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
def test_gradient_of_the_operator_equals_autograd_in_double(cfg):
    logp, old, advantage, mask, cu, token_weight = make_batch(seed=1)
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "compiled")):
        leaf = logp.to(dtype).requires_grad_()
        out = fipo_loss(
            leaf, old.to(dtype), advantage, mask, cu, cfg,
            group_ids_S=torch.tensor(GROUPS), token_weight_T=token_weight, backend=backend,
        )  # fmt: skip
        (3 * out.loss_sum).backward()  # what a trainer does: no division, scaled
        results.append(leaf.grad.double())
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[0].abs().max()
    assert results[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("normalization", ["token", "group", "sequence"])
def test_nothing_to_train_on_gives_zero(backend, normalization):
    cfg = FipoConfig(normalization=normalization)
    for lengths in ([], [0], [0, 0, 0], [3, 2]):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        logp = torch.full((int(cu[-1]),), NAN).requires_grad_()
        out = fipo_loss(
            logp, logp.detach(), torch.ones(len(lengths)), torch.zeros(int(cu[-1]), dtype=torch.bool), cu, cfg,
            group_ids_S=torch.zeros(len(lengths), dtype=torch.long), backend=backend,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == 0.0 and not logp.grad.any()
        assert set(out.metrics.values()) == {0.0}


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_first_update_is_dapo(backend):
    """logp == old_logp: every f is 1 and the loss is -A, whatever the weight range."""
    _, _, advantage, mask, cu, _ = make_batch()
    logp = -torch.rand(mask.shape[0], generator=torch.Generator().manual_seed(3))
    losses = []
    for name in ("fipo-32b", "fipo-7b", "dapo"):
        out = fipo_loss(logp, logp.clone(), advantage, mask, cu, FipoConfig.preset(name), backend=backend)
        assert (out.weights_T == 1).all() and out.metrics["fipo/active_fraction"] == 0
        losses.append(out.loss.item())
    assert losses[0] == losses[1] == losses[2] != 0


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize(
    "log_ratio, advantage, flows",
    [(-25.0, 1.0, False), (-19.0, 1.0, True), (25.0, -1.0, False), (19.0, -1.0, True)],
)
def test_no_gradient_where_the_log_ratio_is_clamped(log_ratio, advantage, flows, backend):
    """The paper's loss has no dual clip, so for A < 0 only the clamp can stop the gradient."""
    cfg = FipoConfig(semantics="paper", normalization="token")
    logp = torch.tensor([log_ratio], requires_grad=True)
    out = fipo_loss(
        logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), torch.tensor([0, 1]), cfg,
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-advantage * math.exp(max(-20, min(20, log_ratio))), rel=1e-5)
    assert bool(logp.grad.any()) == flows


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_is_whole_on_the_edge_of_the_clip_range(advantage, backend):
    """r = 1 with a clip range of [1, 1]: both branches are equal, and the unclipped one counts."""
    logp = torch.zeros(1, requires_grad=True)
    cfg = FipoConfig(clip_low=0.0, clip_high=0.0)
    out = fipo_loss(
        logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), torch.tensor([0, 1]), cfg,
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert logp.grad.item() == -advantage


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_nan_in_the_response_is_not_hidden(backend):
    logp, old, advantage, mask, cu, _ = make_batch()
    token = next(t for t in range(int(cu[6]), int(cu[7])) if mask[t])
    logp[token] = NAN
    logp.requires_grad_()
    out = fipo_loss(logp, old, advantage, mask, cu, FipoConfig(), backend=backend)
    out.loss.backward()
    assert out.loss.isnan()
    assert backend == "torch" or logp.grad[token].isnan()  # torch's clamp passes no gradient at NaN


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([2, 20, 120, 1500]),
    cfg=st.sampled_from(CONFIGS),
    normalization=st.sampled_from(["token", "group", "sequence"]),
)
def test_random_batches(lengths, seed, spread, cfg, normalization):
    """Log-ratios lie on a grid of 1/64, exact in fp32 and away from every threshold."""
    cfg = replace(cfg, normalization=normalization)
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tokens = int(cu[-1])
    logp = torch.randint(-256, 1, (tokens,), generator=g) / 64
    old = logp - torch.randint(-spread, spread + 1, (tokens,), generator=g) / 64
    advantage = torch.randint(-4, 5, (len(lengths),), generator=g) / 2
    mask = torch.rand(tokens, generator=g) < 0.8
    groups = [s // 2 for s in range(len(lengths))]
    per_token = advantage.repeat_interleave(torch.tensor(lengths))
    loss, grad, *_ = oracle(*(x.tolist() for x in (logp, old, per_token, mask, cu)), cfg, groups=groups)
    largest = max((abs(x) for x in grad), default=0.0)
    for backend in ("torch", "compiled"):
        leaf = logp.clone().requires_grad_()
        out = fipo_loss(leaf, old, advantage, mask, cu, cfg, group_ids_S=torch.tensor(groups), backend=backend)
        out.loss.backward()
        # sums may cancel: the error is judged by the size of the terms
        scale = max(abs(loss), largest * max(tokens, 1))
        assert abs(out.loss.item() - loss) <= 2e-5 * scale + 1e-7
        if tokens:
            assert (leaf.grad - torch.tensor(grad, dtype=torch.float64)).abs().max() <= 2e-5 * largest + 1e-9

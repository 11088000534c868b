"""The loss and the scan of context-parallel ranks against the unsharded ones, over gloo groups of 2, 4 and 8."""

import random
from dataclasses import replace

import context_parallel_cases as cases
import pytest
import torch
from context_parallel_cases import INF, Case, run_case

from megatron_fipo.loss import (
    CorrectionConfig,
    FipoConfig,
    LossConfig,
    RatioConfig,
    fipo_loss,
    importance_correction,
    loss_scale,
)
from megatron_fipo.loss.metrics import SUMS
from megatron_fipo.ops import discounted_scan
from megatron_fipo.ops.packed import sum_per_sequence
from megatron_fipo.parallel import zigzag
from megatron_fipo.parallel.carry import context_parallel_discounted_scan
from megatron_fipo.parallel.correction import context_parallel_correction
from megatron_fipo.parallel.loss import context_parallel_fipo_loss, context_parallel_loss

SIZES = (2, 4, 8)
MIXED = (1, 5, 100, 700, 3, 257)  # most chunks of the short ones are padding
SENSITIVE = FipoConfig(weight_low=0.8, weight_high=1.2)  # weights on either side of 1
UNBOUNDED = FipoConfig(semantics="paper", weight_low=0.0, weight_high=INF)  # f = exp(F): every error of F shows
GATHER = "c10d::_allgather_base_"  # how torch names all_gather_into_tensor
REDUCE = "c10d::allreduce_"
HALF_LIVES = (32.0, 128.0, 2048.0, 1e9)

CASES = [
    *(Case(f"half-life {h:g}", (4096, 100, 64, 2500), replace(SENSITIVE, half_life=h), spread=0.3) for h in HALF_LIVES),
    *(Case(f"half-life {h:g} unbounded", (2048, 500, 64), replace(UNBOUNDED, half_life=h)) for h in HALF_LIVES),
    Case("131072 tokens", (131072,), replace(SENSITIVE, half_life=2048.0), spread=0.3),
    Case("no discount", (900, 300), replace(SENSITIVE, half_life=INF)),
    *(
        Case(
            f"{semantics} {normalization}", MIXED, weighted=True, beyond=(0, 0, 2, 2, 0, 1),
            config=replace(SENSITIVE, semantics=semantics, normalization=normalization, sequence_filter=True),
        )
        for semantics in ("official", "paper")
        for normalization in ("token", "group", "sequence")
    ),
    *(Case(f"preset {name}", MIXED, FipoConfig.preset(name), spread=0.5) for name in ("fipo-32b", "fipo-7b", "dapo")),
    Case("padded batch", (4, 400, 30, 250), SENSITIVE, rows=True, weighted=True),
    Case("many sequences", (7, 100, 25, 64, 81) * 8, replace(SENSITIVE, half_life=128.0), align=4),
    Case("filter across shards", (600,), prompt=0.3, beyond=(2,)),
    Case("one token beyond c stays", (600,), prompt=0.3, beyond=(1,)),
    Case("filter of some", (100, 50, 300, 64, 200), SENSITIVE, beyond=(2, 1, 0, 5, 2)),
    Case("ranks with only prompt", (640,), SENSITIVE, prompt=0.8),
    Case("only prompts", (40, 7), prompt=1.0),
    Case("all-padding chunks", (1, 3, 2), SENSITIVE, prompt=0.0, align=16),
    Case("chunks of one token", (1, 2, 3, 2, 1), replace(SENSITIVE, half_life=2048.0), prompt=0.0),
    Case("some sequences empty", (0, 50, 0, 0, 30, 0), SENSITIVE),
    Case("all sequences empty", (0, 0)),
    Case("no sequences", ()),
    Case("torch", MIXED, SENSITIVE, backend="torch"),
    Case("torch fp64", MIXED, replace(SENSITIVE, half_life=2048.0), backend="torch", dtype=torch.float64),
    Case("bf16", MIXED, SENSITIVE, dtype=torch.bfloat16),
]  # fmt: skip


def random_case(seed: int) -> Case:
    r = random.Random(seed)
    config = r.choice([FipoConfig(), SENSITIVE, UNBOUNDED, FipoConfig.preset("fipo-7b"), FipoConfig(dual_clip=3.0)])
    lengths = tuple(r.choice([0, 1, 2, 17, 64, 200, r.randrange(1, 1500)]) for _ in range(r.randrange(1, 12)))
    return Case(
        f"random {seed}",
        lengths,
        replace(
            config,
            half_life=r.choice([1.0, 32.0, 128.0, 2048.0, 1e9, INF]),
            normalization=r.choice([None, "token", "group", "sequence"]),
            sequence_filter=r.choice([None, True]),
        ),
        prompt=r.choice([0.0, 0.3, 0.9]),
        align=r.choice([1, 1, 8]),
        rows=r.random() < 0.3,
        weighted=r.random() < 0.3,
        beyond=tuple(r.choice([0, 0, 1, 2, 3]) for _ in lengths),
        spread=r.choice([0.01, 0.1, 0.3]),
        seed=seed,
    )


SWEEP = [random_case(seed) for seed in range(24)]


def single_rank(group, device):
    """A group of one: nothing is sent and every number is that of fipo_loss, bitwise."""
    case = Case("single", MIXED, SENSITIVE, beyond=(0, 0, 2, 1))
    batch = cases.make_batch(case, size=1)
    results = []
    with cases.Collectives() as collectives:
        for function, extra in ((fipo_loss, ()), (context_parallel_fipo_loss, (group,))):
            leaf = batch.logp_T.clone().requires_grad_()
            out = function(
                leaf, batch.old_logp_T, batch.advantage_S, batch.mask_T, batch.cu_seqlens_S1, case.config, *extra
            )
            out.loss.backward()
            results.append([out.loss.detach(), out.loss_sum.detach(), out.denominator, out.weights_T, leaf.grad])
        x_T = torch.randn(batch.mask_T.shape[0])
        scanned = context_parallel_discounted_scan(x_T, batch.cu_seqlens_S1, 0.9, group)
    same_scan = torch.equal(scanned, discounted_scan(x_T, batch.cu_seqlens_S1, 0.9))
    return collectives.sent, all(torch.equal(a, b) for a, b in zip(*results, strict=True)), same_scan


def scans(group, device):
    """Largest error of returns and of GAE, relative to the largest value, and the bytes sent."""
    size, rank = group.size(), group.rank()
    g = torch.Generator().manual_seed(1)
    cu = zigzag.pad_cu_seqlens(torch.tensor([0, 900, 901, 901, 5000]), 2 * size)
    tokens = int(cu[-1])
    index = zigzag.token_index(cu, tokens, rank, size)
    errors, sent = {}, []
    for dtype in (torch.float32, torch.float64):
        reward = torch.randn(tokens, generator=g, dtype=torch.float64)
        for gamma in (1.0, 2 ** (-1 / 2048), 2 ** (-1 / 32), 0.0):
            exact = discounted_scan(reward, cu, gamma)
            with cases.Collectives() as collectives:
                ours = context_parallel_discounted_scan(reward[index].to(dtype), cu, gamma, group)
            errors[dtype, gamma] = ((ours - exact[index]).abs().max() / exact.abs().max()).item()
            sent.append(collectives.sent)
    reward, value = torch.randn(2, tokens, generator=g, dtype=torch.float64)
    gamma, lam = 0.999, 0.95
    expected = torch.zeros(tokens + 1, dtype=torch.float64)
    ends = set(cu.tolist())
    for t in reversed(range(tokens)):
        last = t + 1 in ends
        delta = reward[t] + (0.0 if last else gamma * value[t + 1]) - value[t]
        expected[t] = delta + (0.0 if last else gamma * lam * expected[t + 1])
    local = (reward + (1 / lam - 1) * value)[index]
    gae = context_parallel_discounted_scan(local, cu, gamma * lam, group) - value[index] / lam
    errors["gae"] = ((gae - expected[index]).abs().max() / expected.abs().max()).item()

    early_nan = reward.clone()
    early_nan[0] = torch.nan  # what lies before a token has no influence on it
    ours = context_parallel_discounted_scan(early_nan[index], cu, 0.9, group)
    errors["nan"] = float(ours.isnan().sum()) - float(rank == 0)
    return errors, sent, len(cu) - 1


def correction(group, device):
    """Whether weights and statistics of all corrections at once are those of whole sequences."""
    size, rank = group.size(), group.rank()
    batch = cases.make_batch(Case("correction", MIXED), size)
    rollout_T = batch.old_logp_T - 0.2 * torch.randn(batch.mask_T.shape, generator=torch.Generator().manual_seed(2))
    tensors, cu = (batch.old_logp_T, rollout_T, batch.mask_T), batch.cu_seqlens_S1
    index = zigzag.token_index(cu, batch.mask_T.shape[0], rank, size)
    same, dropped = [], []
    for specs in ("token-tis:1.2 token-band:0.8:1.3", "sequence-tis:1.5 sequence-mask:0.99:1.01"):
        config = CorrectionConfig.parse(specs.split())
        whole = importance_correction(*tensors, cu, config)
        ours = context_parallel_correction(*(x[index] for x in tensors), cu, config, group)
        torch.distributed.all_reduce(ours.statistics_K, group=group)
        same.append(torch.equal(ours.token_weight_T, whole.token_weight_T[index]))
        same.append(torch.allclose(ours.statistics_K, whole.statistics_K, rtol=1e-12))
        dropped.append((whole.token_weight_T == 0).double().mean().item())
    return same, dropped


OTHER_LOSSES = {
    "gspo": LossConfig(RatioConfig("gspo", 0.003, 0.004, "sequence")),
    "gspo by token": LossConfig(RatioConfig("gspo", 0.003, 0.004, "token"), kl_weight=0.3, kl_estimator="k2"),
    "cispo": LossConfig(RatioConfig("cispo", 1.0, 0.05, "token"), entropy_weight=0.1),
    "reinforce++": LossConfig(FipoConfig.clipped_ratio(0.1, 0.1, "token"), kl_weight=0.3),
    "fipo with penalties": LossConfig(SENSITIVE, kl_weight=0.3, entropy_weight=0.1),
}


def other_losses(group, device):
    """Errors of loss and gradient, relative to the largest, and of the statistics; what was sent; clipped tokens."""
    size, rank = group.size(), group.rank()
    batch = cases.make_batch(Case("other", MIXED, weighted=True, spread=0.3, beyond=(0, 0, 2, 1)), size)
    cu, tokens = batch.cu_seqlens_S1, batch.logp_T.shape[0]
    index = zigzag.token_index(cu, tokens, rank, size)
    generator = torch.Generator().manual_seed(7)
    ref_T = torch.where(batch.mask_T, batch.old_logp_T - 0.3 * torch.randn(tokens, generator=generator), INF)
    entropy_T = torch.where(batch.mask_T, torch.rand(tokens, generator=generator), INF)
    per_token_T = torch.where(batch.mask_T, torch.randn(tokens, generator=generator), INF)
    results = {}
    for name, config in OTHER_LOSSES.items():
        advantage = per_token_T if name in ("gspo by token", "reinforce++") else batch.advantage_S
        scale_S = loss_scale(config.resolved_normalization, sum_per_sequence(batch.mask_T, cu), batch.group_ids_S)

        def run(group, take, config=config, advantage=advantage, scale_S=scale_S):
            leaf, entropy = take(batch.logp_T).requires_grad_(), take(entropy_T).requires_grad_()
            out = context_parallel_loss(
                leaf, take(batch.old_logp_T), advantage if advantage.shape == scale_S.shape else take(advantage),
                take(batch.mask_T), cu, config, group, ref_logp_T=take(ref_T), entropy_T=entropy,
                token_weight_T=take(batch.token_weight_T), loss_scale_S=scale_S,
            )  # fmt: skip
            out.loss_sum.backward()
            return out, leaf.grad, torch.zeros_like(leaf) if entropy.grad is None else entropy.grad

        whole, grad_T, entropy_grad_T = run(cases.Alone(), torch.clone)
        with cases.Collectives() as collectives:
            out, *grads = run(group, lambda values_T: values_T[index])
        totals = torch.cat([out.loss_sum.detach().double()[None], out.denominator[None], out.statistics.sums])
        torch.distributed.all_reduce(totals, group=group)
        expected = torch.cat([whole.loss_sum.detach().double()[None], whole.denominator[None], whole.statistics.sums])
        if config.resolved_normalization != "token":
            expected[1] = size
        largest, scale = grad_T.abs().max(), expected.abs().clamp(min=1)
        scale[2 + SUMS.index("weighted_advantage")] = batch.mask_T.sum()  # its terms cancel, the rounding of f does not
        results[name] = {
            "grad": max(
                (g - w[index]).abs().max() / largest for g, w in zip(grads, (grad_T, entropy_grad_T), strict=True)
            ).item(),
            "totals": ((totals - expected).abs() / scale).max().item(),
            "sent": collectives.sent,
            "clipped": whole.statistics.sums[SUMS.index("clipped")].item() / int(batch.mask_T.sum()),
        }
    return results, len(cu) - 1


def mistakes(group, device):
    """Messages of what is refused, before any collective."""
    batch = cases.make_batch(Case("mistakes", (16, 32)), group.size())
    index = zigzag.token_index(batch.cu_seqlens_S1, batch.logp_T.shape[0], group.rank(), group.size())
    good = {
        "logp_T": batch.logp_T[index],
        "old_logp_T": batch.old_logp_T[index],
        "advantage": batch.advantage_S,
        "response_mask_T": batch.mask_T[index],
        "cu_seqlens_S1": batch.cu_seqlens_S1,
        "config": FipoConfig(),
    }
    messages = []
    for change in (
        {"config": FipoConfig(normalization="group")},
        {"advantage": batch.advantage_S.repeat(2)},
        {"response_mask_T": batch.mask_T},
        {"cu_seqlens_S1": torch.tensor([0, 16, 47])},
        {"cu_seqlens_S1": 2 * batch.cu_seqlens_S1},
    ):
        with cases.Collectives() as collectives, pytest.raises(ValueError) as raised:
            context_parallel_fipo_loss(**good | change, group=group)
        assert not collectives.sent
        messages.append(str(raised.value))
    return messages


@pytest.fixture(scope="module")
def results():
    return cases.run_world(
        [
            *((case.name, case.sizes, run_case, (case,)) for case in CASES + SWEEP),
            ("single rank", (1,), single_rank, ()),
            ("scans", SIZES, scans, ()),
            ("correction", (2, 4), correction, ()),
            ("other losses", SIZES, other_losses, ()),
            ("mistakes", (4,), mistakes, ()),
        ]
    )


def check(case: Case, size: int, ranks: list[dict], loss_relative_to: str = "loss_size") -> None:
    assert len(ranks) == size
    tolerance = 1e-6 if case.config.half_life <= 128 else 1e-5
    if case.dtype == torch.bfloat16:
        tolerance = 2**-7  # the gradient has logp's dtype
    for r in ranks:
        errors = {name: r[name] for name in ("grad", "exact_grad", "sums", "extrema")}
        errors |= {name: r[name] / r[loss_relative_to] for name in ("loss", "exact_loss")}
        assert max(errors.values()) <= tolerance, errors
        assert r["finite"] and r["counts"] == 0 and r["histograms_equal"] and r["near_edge"] <= 2
        assert r["normalizer_error"] <= 1e-14
        if case.config.resolved_normalization == "token":
            assert r["denominator"] == r["whole_denominator"]
        assert r["sent"] == [(GATHER, 12 * r["sequences"])]
    assert sum(r["local_response_tokens"] for r in ranks) == ranks[0]["response_tokens"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_unsharded_loss(results, case, size):
    check(case, size, results[size, case.name])


@pytest.mark.parametrize("size", SIZES)
def test_seeded_sweep(results, size):
    for case in SWEEP:
        check(case, size, results[size, case.name], "terms_size")  # sums of random signs may cancel


@pytest.mark.parametrize("size", SIZES)
def test_the_cases_can_tell(results, size):
    """Guards the tests above: a scan that stays on its rank is wrong by far more than the tolerance, and the cases are
    what their names say."""
    for name in (*(f"half-life {h:g}" for h in HALF_LIVES), "131072 tokens", "padded batch", "many sequences"):
        assert max(r["alone_grad"] for r in results[size, name]) > 1e-2
    assert min(r["local_response_tokens"] for r in results[size, "ranks with only prompt"]) == 0
    assert min(r["local_response_tokens"] for r in results[size, "all-padding chunks"]) == 0
    for name, beyond, kept in (("filter across shards", 2, False), ("one token beyond c stays", 1, True)):
        ranks = results[size, name]
        assert max(r["local_beyond_c"] for r in ranks) == 1 and sum(r["local_beyond_c"] for r in ranks) == beyond
        assert ranks[0]["denominator"] == kept * ranks[0]["response_tokens"]
    some = results[size, "filter of some"][0]
    assert 0 < some["denominator"] < some["response_tokens"]


def test_the_message_leaves_as_soon_as_the_aggregates_exist(results):
    """Two small operations put it together; the powers of gamma are computed while it travels."""
    no_work = {"aten::view", "aten::view.dtype", "aten::slice.Tensor", "aten::detach", "aten::new_empty"}
    for r in results[4, "half-life 32"]:
        operators = [name for name in r["operators"] if name not in no_work]
        aggregate, sent = (operators.index(name) for name in ("megatron_fipo::future_kl_aggregate", GATHER))
        assert operators[aggregate + 1 : sent] == ["aten::sum.dim_IntList", "aten::cat"]
        assert sent < operators.index("aten::pow.Scalar") < operators.index("megatron_fipo::fipo_loss_out")


def test_a_group_of_one_costs_nothing(results):
    ((sent, same_loss, same_scan),) = results[1, "single rank"]
    assert sent == [] and same_loss and same_scan


@pytest.mark.parametrize("size", SIZES)
def test_returns_and_gae(results, size):
    for errors, sent, sequences in results[size, "scans"]:
        for (dtype, gamma), error in ((key, e) for key, e in errors.items() if isinstance(key, tuple)):
            assert error <= (2e-6 if dtype == torch.float32 else 1e-14), (dtype, gamma)
        assert errors["gae"] <= 1e-13 and errors["nan"] == 0
        bytes_sent = [8 * sequences] * 4 + [16 * sequences] * 4
        assert sent == [[(GATHER, n)] for n in bytes_sent]


@pytest.mark.parametrize("size", [2, 4])
def test_importance_correction(results, size):
    for same, dropped in results[size, "correction"]:
        assert all(same) and all(0.05 < share < 0.95 for share in dropped)


@pytest.mark.parametrize("size", SIZES)
def test_other_losses_and_penalties(results, size):
    for losses, sequences in results[size, "other losses"]:
        for name, r in losses.items():
            assert r["grad"] <= 2e-6 and r["totals"] <= 1e-6, name
            assert 0 < r["clipped"] < 1, name
        assert losses["gspo"]["sent"] == losses["gspo by token"]["sent"] == [(REDUCE, 16 * sequences)]
        assert losses["cispo"]["sent"] == []


def test_mistakes_are_named(results):
    for messages in results[4, "mistakes"]:
        for message, word in zip(
            messages,
            ("loss_scale_S", "advantage", "response_mask_T", "pad_cu_seqlens", "beyond the"),
            strict=True,
        ):
            assert word in message


@pytest.mark.long
def test_wide_sweep():
    wide = [random_case(seed) for seed in range(1000, 1600)]
    results = cases.run_world([(case.name, case.sizes, run_case, (case,)) for case in wide])
    for (size, name), ranks in results.items():
        check(wide[int(name.split()[1]) - 1000], size, ranks, "terms_size")

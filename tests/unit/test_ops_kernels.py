"""What the kernels promise whatever the instruction set: error bounds, independence of threads, alignment and buffers,
and the three uses of one primitive. test_ops_instruction_sets.py runs this file for every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.ops import discounted_scan, fused_fipo_loss, future_kl_aggregate
from megatron_fipo.ops.fused_loss import SUMS

INF = float("inf")
SETTINGS = dict(
    advantage_is_per_token=False, gamma=2 ** (-1 / 32), weight_low=0.8, weight_high=1.2, safety_threshold=4.0,
    dual_clip=3.0, clip_low=0.2, clip_high=0.28, paper=False,
)  # fmt: skip


def make_batch(lengths, seed=0, spread=0.1, holes=0.0):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    old_logp = -torch.rand(tokens, generator=g)
    logp = old_logp + spread * torch.randn(tokens, generator=g)
    mask = torch.rand(tokens, generator=g) >= holes
    cu = torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
    return logp, old_logp, torch.randn(len(lengths), generator=g), mask, cu


@pytest.mark.parametrize("half_life, bound", [(32, 5e-7), (512, 5e-6), (2048, 2e-5)])
@pytest.mark.parametrize("cancelling", [False, True])
def test_error_against_float64(half_life, bound, cancelling):
    """131,072 tokens, the scan in both directions, and F as the loss and the aggregate see it."""
    g = torch.Generator().manual_seed(half_life)
    x = 0.05 * torch.randn(131_072, generator=g)
    x = x if cancelling else x.abs()
    cu, gamma = torch.tensor([0, x.shape[0]]), 2 ** (-1 / half_life)
    for reverse in (True, False):
        expected = discounted_scan(x.double(), cu, gamma, reverse=reverse)
        y = discounted_scan(x, cu, gamma, reverse=reverse)
        assert (y - expected).abs().max() <= bound * expected.abs().max()

    expected = discounted_scan(x.double(), cu, gamma)
    zeros, mask, advantage = torch.zeros_like(x), torch.ones(x.shape, dtype=torch.bool), torch.ones(1)
    names = ("dual_clip", "clip_low", "clip_high", "advantage_is_per_token")
    own = {name: SETTINGS[name] for name in names} | {"gamma": gamma}
    aggregate, _ = future_kl_aggregate(x, zeros, advantage, mask, cu, **own)
    assert (aggregate - expected[0]).abs() <= bound * expected.abs().max()
    unclipped = SETTINGS | {"gamma": gamma, "weight_low": 0.0, "weight_high": INF}
    F = fused_fipo_loss(x, zeros, advantage, mask, cu, **unclipped).weight_T.double().log()
    inside = expected.abs() < 79  # beyond it the operator saturates on purpose
    error = (F - expected)[inside].abs() - 4e-7 * (1 + expected[inside].abs())  # less what exp's own rounding may add
    assert error.max() <= bound * expected.abs().max()


LENGTHS = [3, 60_000, 1, 0, 33_000, 9000, 17, 20_000, 255, 256, 257]


def test_results_are_the_same_bits_for_any_number_of_threads():
    logp, old_logp, advantage, mask, cu = make_batch(LENGTHS, holes=0.02)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            fused = fused_fipo_loss(logp, old_logp, advantage, mask, cu, **SETTINGS)
            scans = [discounted_scan(logp, cu, 0.99, reverse=reverse) for reverse in (True, False)]
            results.append([*fused, *scans])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("offset", [1, 5, 16])
def test_alignment_and_neighbours(offset):
    """Inputs and outputs at any address give the same bits, and nothing around the outputs is written."""
    logp, old_logp, advantage, mask, cu = make_batch([5, 0, 100, 33, 1, 700], holes=0.1)
    tokens = logp.shape[0]

    def shifted(values):
        room = torch.full((tokens + 64,), 7, dtype=values.dtype)
        room[offset : offset + tokens] = values
        return room[offset : offset + tokens]

    def buffer():
        room = torch.full((tokens + 64,), -77.0)
        return room, room[offset : offset + tokens]

    (grad_room, grad), (weight_room, weight), (scan_room, scan) = buffer(), buffer(), buffer()
    expected = fused_fipo_loss(logp, old_logp, advantage, mask, cu, **SETTINGS)
    fused = fused_fipo_loss(
        shifted(logp), shifted(old_logp), advantage, shifted(mask), cu, **SETTINGS, out=(grad, weight)
    )
    assert fused.grad_T is grad and all(torch.equal(a, b) for a, b in zip(fused, expected, strict=True))
    for reverse in (True, False):
        discounted_scan(shifted(logp), cu, 0.9, reverse=reverse, out=scan)
        assert torch.equal(scan, discounted_scan(logp, cu, 0.9, reverse=reverse))
        in_place = shifted(logp)
        assert torch.equal(discounted_scan(in_place, cu, 0.9, reverse=reverse, out=in_place), scan)
    for room in (grad_room, weight_room, scan_room):
        assert (room[:offset] == -77).all() and (room[offset + tokens :] == -77).all()


def test_stores_past_the_caches_give_the_same_bits():
    """Large aligned outputs are streamed, unaligned ones are not."""
    lengths = [3001] * 2300  # 27 MB for each output
    logp, old_logp, advantage, mask, cu = make_batch(lengths, holes=0.001)
    tokens = logp.shape[0]
    results = []
    for offset in (0, 1):
        grad, weight, y = (torch.empty(tokens + 16)[offset : offset + tokens] for _ in range(3))
        fused = fused_fipo_loss(logp, old_logp, advantage, mask, cu, **SETTINGS, out=(grad, weight))
        results.append([*fused, discounted_scan(logp, cu, 0.99, out=y)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_buffers_and_gradients_do_not_mix():
    logp, *rest = make_batch([5, 3])
    buffers = torch.empty(8), torch.empty(8)
    with pytest.raises(ValueError, match="out cannot be combined with a gradient"):
        fused_fipo_loss(logp.requires_grad_(), *rest, **SETTINGS, out=buffers)
    with torch.no_grad():
        assert fused_fipo_loss(logp, *rest, **SETTINGS, out=buffers).grad_T is buffers[0]


@pytest.mark.parametrize("wrong", [[0, 9], [1, 8], [0, 5, 3, 8]])
def test_wrong_offsets_are_value_errors(wrong):
    logp, old_logp, _, mask, _ = make_batch([5, 3])
    cu = torch.tensor(wrong)
    for call in (
        lambda: fipo_loss(logp, old_logp, torch.ones(len(wrong) - 1), mask, cu, FipoConfig()),
        lambda: fipo_loss(logp.requires_grad_(), old_logp, torch.ones(len(wrong) - 1), mask, cu, FipoConfig()),
        lambda: discounted_scan(logp, cu, 0.9),
    ):
        with pytest.raises(ValueError, match="cu_seqlens"):
            call()


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    batch = make_batch([5, 0, 30])
    names = ("dual_clip", "clip_low", "clip_high", "advantage_is_per_token", "gamma")
    own = {name: SETTINGS[name] for name in names}

    def all_outputs(logp, old_logp, advantage, mask, cu):
        return [
            discounted_scan(logp, cu, 0.9),
            *fused_fipo_loss(logp, old_logp, advantage, mask, cu, **SETTINGS),
            *future_kl_aggregate(logp, old_logp, advantage, mask, cu, **own),
            torch.ops.megatron_fipo.scale_per_sequence(logp, advantage.double(), cu),
        ]

    real = all_outputs(*batch)
    with FakeTensorMode() as mode:
        fake = all_outputs(*(mode.from_tensor(tensor) for tensor in batch))
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(200, 700)), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.02, 0.3, 4.0]),
    holes=st.sampled_from([0.0, 0.02, 0.5]),
    prompt=st.integers(0, 60),
    per_token=st.booleans(),
    weighted=st.booleans(),
    with_carry=st.booleans(),
    cfg=st.sampled_from(
        [
            FipoConfig(sequence_filter=False),
            FipoConfig(weight_low=0.0, weight_high=10.0, half_life=7.0, safety_threshold=1.5, dual_clip=2.0),
            FipoConfig(semantics="paper", weight_low=0.0, weight_high=INF, half_life=500.0, normalization="sequence"),
        ]
    ),
)
def test_sweep_against_float64(lengths, seed, spread, holes, prompt, per_token, weighted, with_carry, cfg):
    """Prompts, holes, runs of ordinary tokens over several chunks and tokens beyond every threshold, in any mixture."""
    logp, old_logp, advantage, mask, cu = make_batch(lengths, seed, spread, holes)
    g = torch.Generator().manual_seed(seed)
    for begin in cu[:-1].tolist():
        mask[begin : begin + prompt] = False
    if per_token:
        advantage = torch.randn(logp.shape, generator=g)
    token_weight = torch.rand(logp.shape, generator=g) if weighted else None
    carry = 0.1 * torch.randn(len(lengths), generator=g) if with_carry else None
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "compiled")):
        leaf = logp.to(dtype).requires_grad_()
        out = fipo_loss(
            leaf, old_logp.to(dtype), advantage, mask, cu, cfg,
            token_weight_T=token_weight, carry_S=carry, backend=backend,
        )  # fmt: skip
        out.loss_sum.backward()
        results.append((out, leaf.grad.double()))
    (expected, grad), (out, own_grad) = results
    # a token within rounding of a threshold may fall on either side of it
    ratio = (logp.double() - old_logp.double()).exp()
    edges = (1 - cfg.clip_low, 1 + cfg.clip_high, cfg.safety_threshold, cfg.dual_clip)
    clear = torch.stack([(ratio / edge - 1).abs() > 1e-5 for edge in edges]).all(0) | ~mask
    scale = max(float(grad.abs().max()) if grad.numel() else 0.0, 1e-30)
    assert ((own_grad - grad).abs()[clear] <= 3e-5 * scale).all()
    if clear.all() and logp.numel():
        torch.testing.assert_close(out.weights_T.double(), expected.weights_T, rtol=1e-4, atol=1e-9)
        # sums may cancel: the error is judged by the size of the terms, clipped ones included
        clipped = float(advantage.abs().max() * expected.weights_T.max() * max(cfg.dual_clip, 1 + cfg.clip_high))
        terms = logp.shape[0] * (scale + clipped)
        assert abs(out.loss_sum.item() - expected.loss_sum.item()) <= 1e-5 * terms
        for name, own, exact in zip(SUMS, out.token_statistics_K, expected.token_statistics_K, strict=False):
            # whether a weight is exactly 1 or exactly at its bound depends on the precision
            if name not in ("active", "weight_at_high", "weight_at_low"):
                assert abs(own - exact) <= 1e-4 * abs(exact) + 1e-4 * logp.shape[0] ** 0.5, name
        torch.testing.assert_close(
            out.token_statistics_K[len(SUMS) :], expected.token_statistics_K[len(SUMS) :], rtol=1e-4, atol=1e-6
        )


def test_one_primitive_gives_returns_and_advantages():
    """REINFORCE++: returns of token rewards. GAE: the scan of TD errors with gamma * lambda. Against plain loops."""
    g = torch.Generator().manual_seed(3)
    lengths, gamma, lam = [5, 1, 40, 0, 23], 0.99, 0.95
    cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    reward, value = torch.randn(2, sum(lengths), generator=g)
    returns, advantage, errors = torch.zeros(3, sum(lengths))
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        following_return = following_advantage = following_value = 0.0
        for t in range(end - 1, begin - 1, -1):
            following_return = returns[t] = reward[t] + gamma * following_return
            errors[t] = reward[t] + gamma * following_value - value[t]
            following_advantage = advantage[t] = errors[t] + gamma * lam * following_advantage
            following_value = value[t]
    torch.testing.assert_close(discounted_scan(reward, cu, gamma), returns, rtol=1e-5, atol=1e-5)
    next_value = torch.cat([value[1:], value.new_zeros(1)])
    next_value[cu[1:][cu[1:] > 0] - 1] = 0.0  # nothing follows a sequence's last token
    td_error = reward + gamma * next_value - value
    torch.testing.assert_close(discounted_scan(td_error, cu, gamma * lam), advantage, rtol=1e-5, atol=1e-5)

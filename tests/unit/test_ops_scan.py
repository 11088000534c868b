"""discounted_scan against a loop in double precision: both directions, carries, gradients, every length of register."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.ops import discounted_scan, reference_discounted_scan

IMPLEMENTATIONS = [discounted_scan, reference_discounted_scan]


def loop(x, cu, gamma, reverse, carry=None):
    y = [0.0] * len(x)
    for s, (begin, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        value = carry[s] if carry is not None else 0.0
        for t in range(end - 1, begin - 1, -1) if reverse else range(begin, end):
            value = x[t] + gamma * value
            y[t] = value
    return torch.tensor(y, dtype=torch.float64)


def offsets(lengths, dtype=torch.int32):
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("half_life", [0.5, 32.0, 2048.0, float("inf")])
@pytest.mark.parametrize("with_carry", [False, True])
def test_against_loop(implementation, reverse, half_life, with_carry):
    g = torch.Generator().manual_seed(0)
    lengths = [1, 0, 2, 3, 4, 5, 15, 16, 17, 0, 100, 4095, 511, 512, 513]
    cu, gamma = offsets(lengths), 2 ** (-1 / half_life)
    x = torch.randn(sum(lengths) + 6, generator=g)
    x[-6:] = torch.tensor([float("nan"), float("inf"), 1, 2, 3, 4])
    carry = torch.randn(len(lengths), generator=g) if with_carry else None
    y = implementation(x, cu, gamma, reverse=reverse, carry=carry)
    expected = loop(x.tolist(), cu.tolist(), gamma, reverse, None if carry is None else carry.tolist())
    assert y.dtype == torch.float32
    assert (y[-6:] == 0).all()
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    if half_life == 32.0:
        assert (y - expected).abs().max() <= 4e-7 * expected.abs().max()


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("half_life", [32.0, 2048.0, 1e9])
def test_long_sequences_take_two_levels(reverse, half_life):
    """Blocks of 16,384 tokens with carries between them: as exact as one pass."""
    g = torch.Generator().manual_seed(0)
    lengths = [32768, 32769, 100, 70001, 16384]
    cu, gamma = offsets(lengths, torch.int64), 2 ** (-1 / half_life)
    # all positive: nothing cancels, and a rounding of gamma would show
    x = 0.05 * torch.randn(sum(lengths), generator=g).abs()
    carry = torch.rand(len(lengths), generator=g)
    y = discounted_scan(x, cu, gamma, reverse=reverse, carry=carry)
    expected = loop(x.tolist(), cu.tolist(), gamma, reverse, carry.tolist())
    assert ((y - expected) / expected).abs().max() <= 5e-7


def test_float64_input_gives_float64():
    x = torch.randn(50, dtype=torch.float64)
    y = discounted_scan(x, offsets([20, 30]), 0.9)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, loop(x.tolist(), [0, 20, 50], 0.9, True), rtol=1e-14, atol=1e-14)


def test_int32_and_int64_offsets_agree_and_threads_do_not_matter():
    x, lengths = torch.randn(200_000), [3, 90_000, 40_000, 1, 69_996]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results += [discounted_scan(x, offsets(lengths, dtype), 0.99) for dtype in (torch.int32, torch.int64)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_out_is_written_and_returned():
    x, cu = torch.randn(40), offsets([10, 20])
    expected = discounted_scan(x, cu, 0.9)
    out = torch.full_like(x, float("nan"))
    assert discounted_scan(x, cu, 0.9, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(discounted_scan(x, cu, 0.9, out=x), expected)  # in place


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [True, False])
def test_gradients(implementation, reverse):
    """Against finite differences, in x and carry, also twice; an empty sequence's carry has no effect."""
    cu = offsets([3, 0, 1, 5, 0])
    x = torch.randn(11, dtype=torch.float64, requires_grad=True)
    carry = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def scan(x, carry):
        return implementation(x, cu, 0.8, reverse=reverse, carry=carry)

    assert torch.autograd.gradcheck(scan, (x, carry))
    assert torch.autograd.gradgradcheck(scan, (x, carry))
    scan(x, carry).sum().backward()
    assert carry.grad[1] == carry.grad[4] == 0 and carry.grad[0] != 0
    assert (x.grad[9:] == 0).all()


def test_gradients_in_float32_keep_their_dtypes():
    x, carry = torch.randn(9, requires_grad=True), torch.randn(2, requires_grad=True)
    discounted_scan(x, offsets([4, 5]), 0.8, carry=carry).square().sum().backward()
    assert x.grad.dtype == carry.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(x_T=torch.zeros(4, dtype=torch.float16)), "x must"),
        (dict(x_T=torch.zeros(2, 2)), "x must"),
        (dict(cu_seqlens_S1=torch.tensor([0.0, 4.0])), "cu_seqlens"),
        (dict(cu_seqlens_S1=torch.tensor([[0, 4]])), "cu_seqlens"),
        (dict(cu_seqlens_S1=torch.tensor([], dtype=torch.int32)), "cu_seqlens"),
        (dict(cu_seqlens_S1=torch.tensor([1, 4])), "cu_seqlens must start at 0, not 1"),
        (dict(cu_seqlens_S1=torch.tensor([0, 3, 2, 4])), "cu_seqlens must not decrease"),
        (dict(cu_seqlens_S1=torch.tensor([0, 5])), "cu_seqlens ends at 5"),
        (dict(carry=torch.zeros(2)), "carry"),
        (dict(carry=torch.zeros(1, dtype=torch.int32)), "carry"),
        (dict(out=torch.zeros(5)), "out must"),
        (dict(out=torch.zeros(4, dtype=torch.float64)), "out must"),
        (dict(out=torch.zeros(4), x_T=torch.zeros(4, requires_grad=True)), "out cannot"),
    ],
)
def test_wrong_input_is_named(arguments, named):
    base = dict(x_T=torch.zeros(4), cu_seqlens_S1=torch.tensor([0, 4]), gamma=0.9)
    with pytest.raises(ValueError, match=named):
        discounted_scan(**(base | arguments))


def test_the_operator_itself_never_reads_out_of_bounds():
    """Under torch.compile the Python checks are skipped."""
    for cu in ([0, 9], [-1, 4], [0, 3, 2], []):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.megatron_fipo.discounted_scan(
                torch.zeros(4), torch.tensor(cu, dtype=torch.int64), 0.9, True, None
            )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=8),
    padding=st.integers(0, 5),
    gamma=st.floats(0.0, 1.0),
    reverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_packs(lengths, padding, gamma, reverse, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths) + padding, generator=g)
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    carry = torch.randn(len(lengths), generator=g)
    expected = loop(x.tolist(), cu.tolist(), gamma, reverse, carry.tolist())
    for implementation in IMPLEMENTATIONS:
        y = implementation(x, cu, gamma, reverse=reverse, carry=carry)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)

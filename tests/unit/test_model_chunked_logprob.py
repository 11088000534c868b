"""Tiled log-probs: against float64, bit for bit between modes, and never with all logits in memory."""

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fipo.model.chunked_logprob import ALIGNMENT, TILE_BYTES, _blocks, log_probs_of_labels, tile_shape

SMALL_TILE = 4 * ALIGNMENT**2
# Rows, padded vocabulary, vocabulary, bytes of a tile: everything in one tile (torch's own operations for fp32); cut
# both ways, into pieces that do not divide it; cut along the vocabulary alone; along the rows alone.
SHAPES = [
    (300, 520, 500, TILE_BYTES),
    (300, 520, 500, SMALL_TILE),
    (60, 1000, 900, SMALL_TILE),
    (1000, 64, 60, SMALL_TILE),
]


def problem(rows, padded, vocab, dtype=torch.float32, hidden=24):
    generator = torch.Generator().manual_seed(rows)
    hidden_RH = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight_VH = torch.randn(padded, hidden, generator=generator).to(dtype)
    weight_VH[vocab:] = 1e4  # padding that would take all probability
    labels_R = torch.randint(0, vocab, (rows,), generator=generator)
    upstream_R = torch.randn(rows, generator=generator)
    return hidden_RH, weight_VH, labels_R, upstream_R


def oracle(hidden_RH, weight_VH, labels_R, upstream_R, vocab, temperature, entropy_upstream_R=None):
    """Log-probs, entropies, and gradients of hidden states and weight, in float64."""
    hidden_RH, weight_VH = (x.double().requires_grad_() for x in (hidden_RH, weight_VH))
    logp_RV = (hidden_RH @ weight_VH[:vocab].T / temperature).log_softmax(1)
    logp_R = logp_RV.gather(1, labels_R[:, None])[:, 0]
    entropy_R = -(logp_RV.exp() * logp_RV).sum(1)
    total = (logp_R * upstream_R).sum()
    if entropy_upstream_R is not None:
        total = total + (entropy_R * entropy_upstream_R).sum()
    total.backward()
    return logp_R.detach(), entropy_R.detach(), hidden_RH.grad, weight_VH.grad


def assert_close(found, expected, tolerance):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_oracle(shape, dtype, temperature, entropy_gradient):
    """Also of the entropy, dH/dz = -p (log p + H) / temperature, beside that of the log-prob."""
    rows, padded, vocab, tile_bytes = shape
    hidden_RH, weight_VH, labels_R, upstream_R = problem(rows, padded, vocab, dtype)
    entropy_upstream_R = 3 * upstream_R.flip(0) if entropy_gradient else None
    expected = oracle(hidden_RH, weight_VH, labels_R, upstream_R, vocab, temperature, entropy_upstream_R)
    hidden_RH.requires_grad_(), weight_VH.requires_grad_()
    logp_R, entropy_R = log_probs_of_labels(
        hidden_RH, weight_VH, labels_R,
        vocab_size=vocab, temperature=temperature, with_entropy=True, tile_bytes=tile_bytes,
    )  # fmt: skip
    total = (logp_R * upstream_R).sum()
    (total + (entropy_R * entropy_upstream_R).sum() if entropy_gradient else total).backward()
    assert logp_R.dtype == entropy_R.dtype == torch.float32
    assert_close(logp_R, expected[0], 1e-6)  # fp32 logits also for bf16 weights
    assert_close(entropy_R, expected[1], 2e-6)
    gradient_tolerance = 2**-8  # of the result's own rounding
    if dtype == torch.float32:  # log p + H is small where its terms are not
        gradient_tolerance = 5e-6 if entropy_gradient else 2e-6
    assert hidden_RH.grad.dtype == weight_VH.grad.dtype == dtype
    assert_close(hidden_RH.grad, expected[2], gradient_tolerance)
    assert_close(weight_VH.grad, expected[3], gradient_tolerance)
    assert not weight_VH.grad[vocab:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_are_bitwise_equal_with_and_without_gradients_and_entropy(shape, dtype):
    rows, padded, vocab, tile_bytes = shape
    hidden_RH, weight_VH, labels_R, _ = problem(rows, padded, vocab, dtype)
    weight_VH.requires_grad_()
    found = []
    for gradients, with_entropy in itertools.product((False, True), repeat=2):
        with torch.set_grad_enabled(gradients):
            logp_R, _ = log_probs_of_labels(
                hidden_RH, weight_VH, labels_R, vocab_size=vocab, with_entropy=with_entropy, tile_bytes=tile_bytes
            )
        assert logp_R.requires_grad == gradients
        found.append(logp_R.detach())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_an_entropy_alone_has_its_gradient():
    for shape in SHAPES:
        rows, padded, vocab, tile_bytes = shape
        hidden_RH, weight_VH, labels_R, upstream_R = problem(rows, padded, vocab)
        expected = oracle(hidden_RH, weight_VH, labels_R, torch.zeros(rows), vocab, 1.0, upstream_R)
        hidden_RH.requires_grad_()
        _, entropy_R = log_probs_of_labels(
            hidden_RH, weight_VH, labels_R, vocab_size=vocab, with_entropy=True, tile_bytes=tile_bytes
        )
        (entropy_R * upstream_R).sum().backward()
        assert_close(hidden_RH.grad, expected[2], 5e-6)


def test_extreme_logits_stay_finite_and_exact():
    """Maxima that grow by hundreds from tile to tile, and a certain label."""
    hidden_RH = torch.ones(1, 1)
    weight_VH = torch.arange(1024.0)[:, None].requires_grad_()
    labels_R = torch.tensor([1023])
    logp_R, entropy_R = log_probs_of_labels(
        hidden_RH, 4 * weight_VH, labels_R, vocab_size=1024, with_entropy=True, tile_bytes=SMALL_TILE
    )
    logp_R.sum().backward()
    expected = oracle(hidden_RH, 4 * weight_VH.detach(), labels_R, torch.ones(1), 1024, 1.0)
    torch.testing.assert_close(logp_R.double(), expected[0], atol=1e-7, rtol=0)
    torch.testing.assert_close(entropy_R.double(), expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(weight_VH.grad.double(), 4 * expected[3], atol=1e-6, rtol=0)


def test_no_row_is_no_special_case():
    for dtype in (torch.float32, torch.bfloat16):
        weight_VH = torch.randn(16, 8).to(dtype).requires_grad_()
        hidden_RH = torch.randn(0, 8).to(dtype).requires_grad_()
        logp_R, entropy_R = log_probs_of_labels(
            hidden_RH, weight_VH, torch.zeros(0, dtype=torch.int64), vocab_size=16, with_entropy=True
        )
        logp_R.sum().backward()
        assert logp_R.shape == entropy_R.shape == (0,)
        assert weight_VH.grad is not None and not weight_VH.grad.any()  # a pipeline stage without response tokens


def test_tiles_keep_to_their_bytes_and_to_the_alignment():
    sizes = (1, 7, 128, 129, 1000, 4096, 32768, 152064)
    for rows, columns, tile_bytes in itertools.product(sizes, sizes, (SMALL_TILE, 2**20 + 4, TILE_BYTES)):
        height, width = tile_shape(rows, columns, tile_bytes)
        assert 4 * height * width <= tile_bytes
        for total, length in ((rows, height), (columns, width)):
            assert length == total or length % ALIGNMENT == 0
            blocks = _blocks(total, length)
            assert [i for b in blocks[:2] for i in range(total)[b]] == list(range(blocks[:2][-1].stop))
            assert blocks[-1].stop == total and all(a.stop == b.start for a, b in itertools.pairwise(blocks))
        if 4 * rows * columns <= tile_bytes:
            assert (height, width) == (rows, columns)


class AliveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that were made while the mode was on, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_all_logits_are_never_alive(dtype, with_entropy):
    rows, vocab, hidden = 2000, 3000, 16
    hidden_RH, weight_VH, labels_R, _ = problem(rows, vocab, vocab, dtype, hidden)
    hidden_RH.requires_grad_(), weight_VH.requires_grad_()

    def watch(tile_bytes):
        with AliveBytes() as watched:
            logp_R, _ = log_probs_of_labels(
                hidden_RH, weight_VH, labels_R, vocab_size=vocab, with_entropy=with_entropy, tile_bytes=tile_bytes
            )
            logp_R.sum().backward()
        return watched

    tile_bytes = 16 * SMALL_TILE  # 1 MiB, where the logits take 23
    tiled, whole = watch(tile_bytes), watch(TILE_BYTES)
    # fp32 copies of operands, gradients of hidden states and weight, a score of numbers for each row, two tiles.
    assert tiled.largest <= tile_bytes
    assert tiled.peak <= 2 * tile_bytes + 4 * (4 * rows * hidden + 2 * vocab * hidden + 20 * rows)
    assert whole.largest >= 4 * rows * vocab  # the watcher sees what it looks for

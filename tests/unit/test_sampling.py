"""Counter-based sampling against the distributions and the hash that it must follow."""

import pytest
import torch

from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.sampling import _splitmix64, sample, uniform

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hash_is_splitmix64_bit_for_bit():
    # The first output of the published generator from seed 1234567.
    assert splitmix64(1234567) == 6457827717110365317
    values = [0, 1, -1, 1234567, 2**63 - 1, -(2**63), 987654321987654321]
    hashed = _splitmix64(torch.tensor(values))
    assert [h & MASK for h in hashed.tolist()] == [splitmix64(v & MASK) for v in values]


def test_uniform_numbers_are_uniform_and_uncorrelated():
    seeds = torch.arange(100_000)
    for index in (0, 1, 1000):
        u = uniform(seeds, index)
        assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
        histogram = torch.histc(u, 100, 0, 1)
        chi2 = float(((histogram - 1000) ** 2 / 1000).sum())
        assert chi2 < 150  # 99 degrees of freedom: mean 99, standard deviation 14
    pairs = torch.stack([uniform(seeds, 0), uniform(seeds, 1), uniform(seeds + 1, 0)])
    assert float((pairs.corrcoef() - torch.eye(3)).abs().max()) < 0.02


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_frequencies_follow_temperature_and_top_p(temperature, top_p):
    draws, vocab = 200_000, 12
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    token, logp = sample(
        logits.expand(draws, -1), torch.arange(draws), 3, SamplingParams(1, temperature=temperature, top_p=top_p)
    )
    unscaled = (logits.double() / temperature).softmax(0)
    kept, mass = [], 0.0
    for v in unscaled.argsort(descending=True).tolist():  # the smallest set that reaches top_p
        if mass >= top_p:
            break
        kept.append(v)
        mass += float(unscaled[v])
    wanted = torch.zeros(vocab, dtype=torch.float64)
    wanted[kept] = unscaled[kept] / unscaled[kept].sum()
    frequency = torch.bincount(token, minlength=vocab) / draws
    assert float((frequency - wanted).abs().max()) < 0.006  # five standard deviations at p = 1/2
    assert set(token.unique().tolist()) <= set(kept)
    torch.testing.assert_close(logp.double(), unscaled.log()[token], atol=1e-5, rtol=0)  # before top-p


def test_greedy_takes_the_largest_and_reports_unscaled_log_probs():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    token, logp = sample(logits, torch.zeros(5, dtype=torch.int64), 0, SamplingParams(1, temperature=0.0))
    assert torch.equal(token, logits.argmax(1))
    torch.testing.assert_close(logp, logits.log_softmax(1).max(1).values)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((100_000, 6), -torch.inf)
    logits[:, 1] = logits[:, 4] = 0.0
    token, _ = sample(logits, torch.arange(100_000), 0, SamplingParams(1))
    assert set(token.tolist()) == {1, 4}

"""Counter-based sampling: a token depends on its logits, its response's seed and its index, on nothing else.

There is no generator whose state would have to be saved, and rows can be batched in any way.
"""

import torch
from torch import Tensor

from megatron_fipo.rollout.engine import SamplingParams


def _int64(value: int) -> int:
    """The int64 with the bits of the unsigned `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _MIX1, _MIX2 = map(_int64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) after one increment, on int64 with wrap-around."""
    x = x + _GAMMA
    x = (x ^ _logical_shift_right(x, 30)) * _MIX1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX2
    return x ^ _logical_shift_right(x, 31)


def uniform(seed_B: Tensor, index: int | Tensor) -> Tensor:
    """A uniform number for each seed (int64 [B]) and token index: float64 [B], multiples of 2**-52 in [0, 1)."""
    # The seed is hashed before the index is added, so that neighbouring seeds do not share shifted streams.
    bits = _splitmix64(_splitmix64(seed_B) + index)
    return _logical_shift_right(bits, 12).double() * 2.0**-52


def sample(logits_BV: Tensor, seed_B: Tensor, index: int | Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw the token with number `index` (0 is a response's first) of each row.

    Args:
        logits_BV: fp32, real vocabulary only.
        seed_B: int64.

    Returns:
        token_B int64, logp_B fp32: its log-prob from logits / temperature (greedy: from the logits), before top-p.
    """
    if sampling.temperature == 0.0:
        logp_BV = logits_BV.log_softmax(-1)
        token_B = logits_BV.argmax(-1)
    else:
        logp_BV = (logits_BV / sampling.temperature).log_softmax(-1)
        token_B = _draw(logp_BV.exp(), uniform(seed_B, index), sampling.top_p)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def _draw(probability_BV: Tensor, uniform_B: Tensor, top_p: float) -> Tensor:
    """Invert the cumulative distribution, after cutting it to the smallest set of tokens whose sum reaches top_p."""
    if top_p >= 1.0:
        return _invert(probability_BV, uniform_B)
    sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, 0.0)
    return token_BV.gather(1, _invert(kept_BV, uniform_B)[:, None])[:, 0]


def _invert(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds uniform * total; in float64 it never has probability 0."""
    cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]

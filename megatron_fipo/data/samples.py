"""One generated response with everything the trainer needs to know about it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """A scored response.

    tokens          [n] int32, prompt and response token ids
    response_mask   [n] bool, tokens that the policy wrote (may have holes: tool output, other turns)
    rollout_logp    [n] fp32, log-probs that the engine reported, 0 where ``response_mask`` is false
    finish_reason   "stop" or "length"
    weight_versions ((version, first response token, end), ...): which weights drew which tokens
    reward          the scalar that advantages are made of
    correct         the verifier's verdict
    """

    prompt_id: int
    group_id: int
    tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logp: np.ndarray
    finish_reason: str
    weight_versions: tuple[tuple[int, int, int], ...]
    reward: float
    correct: bool

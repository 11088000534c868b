"""The interface that every rollout engine implements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

MAX_RUNNING = 256
"""Completions that a replica generates at once, unless --rollout-max-running says. About where a decoding step's
arithmetic takes as long as reading the weights: more of them gain little."""

ProgressCallback = Callable[[int], None]
"""Called with the number of completions that have just finished."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    ``temperature`` 0 is greedy. Log-probs are taken from logits / temperature (greedy: from the logits), before top-p.
    A stop token ends a completion and is part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One response.

    ``tokens`` [n] response token ids, ``logp`` [n] their fp32 log-probs under the weights that drew them,
    ``finish_reason`` "stop" (an engine's: the last token is a stop token) or "length".
    ``generated`` [n] says which tokens were drawn by the weights (None: all); ``logp`` of the others is 0.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: str
    generated: tuple[bool, ...] | None = None


class RolloutEngine(Protocol):
    """Generates completions with the policy's current weights.

    A completion depends on the weights, its prompt and its seed only, never on the rows that share its batch
    (up to floating-point rounding), so the same seeds give the same rollout on any number of replicas.
    """

    @property
    def in_step(self) -> Sequence[dist.ProcessGroup]:
        """Groups that, reduced over in turn, join the ranks which generate in step."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
        starts: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Return one completion for each (prompt, seed), in order. Seeds are 63-bit integers.

        ``starts`` are the completions' places in their responses (None: 0): the token there is drawn as it would have
        been if one call had generated all of the response up to it.
        ``given_up`` is asked every few dozen tokens, by ranks that generate in step at the same points, with the same
        answer. Once it is true nobody wants the completions any more: the engine returns early, with an empty list.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Make the trainer's current weights the ones that generate; ``version`` labels them."""
        ...

    def sleep(self) -> None:
        """Give back what generation alone needs (the KV cache) before the update phase."""
        ...

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        ...

    def metrics(self) -> dict[str, float]:
        """What else to record about a step, under the names of its metrics; the first rank's are recorded."""
        ...

    def close(self) -> None:
        """Stop the engine and everything that it started."""
        ...

"""From prompts to responses: what stands between the rollout's collection and an engine."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.rollout.engine import Completion, ProgressCallback, RolloutEngine, SamplingParams


class Responds(Protocol):
    """What a rollout or an evaluation is collected with."""

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
    ) -> list[Completion]:
        """One response for each (prompt, seed), in order; called together by the ranks that call an engine together."""
        ...


class Responder(Responds, Protocol):
    """Responds with an engine, and can be given up."""

    @property
    def in_step(self) -> Sequence[dist.ProcessGroup]:
        """As :attr:`RolloutEngine.in_step`."""
        ...

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """As :meth:`Responds.respond`; ``given_up`` as in :meth:`RolloutEngine.generate`."""
        ...


class SingleTurn:
    """Responses are what the engine makes of the prompts."""

    def __init__(self, engine: RolloutEngine):
        self._engine, self.in_step = engine, engine.in_step

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """As Responder."""
        return self._engine.generate([prompt.tokens for prompt in prompts], seeds, sampling, on_finished, given_up)

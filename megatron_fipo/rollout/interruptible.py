"""A rollout engine that gives up when a signal asks the run to stop."""

from collections.abc import Sequence

from megatron_fipo.parallel.interruption import Interruption
from megatron_fipo.rollout.engine import Completion, ProgressCallback, RolloutEngine, SamplingParams


class InterruptibleEngine:
    """Generates with an engine, looking for signals while it does and afterwards.

    Ranks that generate in step stop together; replicas whose signal comes later, or not at all, finish their share.
    """

    def __init__(self, engine: RolloutEngine, interruption: Interruption) -> None:
        self._engine, self._interruption = engine, interruption

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
    ) -> list[Completion]:
        """As RolloutEngine. Collective over all ranks; raises Interrupted on all of them if any got a signal."""
        completions = self._engine.generate(prompts, seeds, sampling, on_finished, self._interrupted_in_step)
        self._interruption.check()
        return completions

    def _interrupted_in_step(self) -> bool:
        return self._interruption.received(*self._engine.in_step)

"""Responses that are given up when a signal asks the run to stop."""

from collections.abc import Sequence

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.parallel.interruption import Interruption
from megatron_fipo.rollout.engine import Completion, ProgressCallback, SamplingParams
from megatron_fipo.rollout.responder import Responder


class InterruptibleResponder:
    """Looks for signals while responses are made and afterwards.

    Ranks that generate in step stop together; replicas whose signal comes later, or not at all, finish their share.
    """

    def __init__(self, responder: Responder, interruption: Interruption) -> None:
        self._responder, self._interruption = responder, interruption

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
    ) -> list[Completion]:
        """As Responds. Collective over all ranks; raises Interrupted on all of them if any got a signal."""
        completions = self._responder.respond(prompts, seeds, sampling, on_finished, self._interrupted_in_step)
        self._interruption.check()
        return completions

    def _interrupted_in_step(self) -> bool:
        return self._interruption.received(self._responder.in_step)

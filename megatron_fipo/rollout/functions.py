"""A user's own generation loop: ``--rollout-function package.module:name``. See docs/rollout_functions.md."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.functions import import_function, required_parameters
from megatron_fipo.rollout.conversations import Conversations
from megatron_fipo.rollout.dialogue import Dialogue, Request
from megatron_fipo.rollout.engine import Completion, ProgressCallback, RolloutEngine, SamplingParams

SECONDS = 120.0
"""For the user's code between two requests for tokens; well below the process groups' timeout, as other ranks wait."""

_FLAG = "--rollout-function"


@dataclass(frozen=True)
class RolloutFunction:
    """A loaded ``async def function(dialogue: Dialogue) -> None``."""

    name: str
    call: Callable[[Dialogue], Awaitable[Any]]

    @classmethod
    def load(cls, name: str) -> "RolloutFunction":
        """Import ``package.module:name``. Raises UserError."""
        function = import_function(_FLAG, name)
        if not inspect.iscoroutinefunction(function) or len(required_parameters(function)) != 1:
            raise UserError(f"{_FLAG} {name} must be 'async def {name.split(':')[1]}(dialogue)'")
        return cls(name, function)


class FunctionResponder:
    """Responses that a user's function writes together with the engine.

    The function runs on each replica's leader: what tools say may differ from call to call. In rounds: all coroutines
    of the batch run until each has finished or waits for tokens; then all ranks ask the engine for these together.
    """

    def __init__(
        self,
        function: RolloutFunction,
        engine: RolloutEngine,
        replicas: Replicas,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        seconds: float = SECONDS,
    ):
        """``vocab_size`` is the real one; ``seconds`` bound the function's work between two requests."""
        self._function, self._engine, self._replicas = function, engine, replicas
        self._tokenizer, self._vocab_size, self._seconds = tokenizer, vocab_size, seconds
        self.in_step = engine.in_step

    def respond(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """As Responder; ``on_finished`` is called on the leader. Raises UserError if the function fails."""
        batch: Conversations | None = None
        if self._replicas.leads:
            batch = Conversations(
                self._function.call, self._function.name, _event_loop(), self._seconds,
                [
                    Dialogue(prompt, seed, sampling, self._tokenizer, self._vocab_size)
                    for prompt, seed in zip(prompts, seeds, strict=True)
                ],
            )  # fmt: skip
        stopped = False

        def stop() -> bool:
            nonlocal stopped
            stopped = stopped or given_up()
            return stopped

        answers: dict[int, Completion] = {}
        try:
            while True:
                requests = self._from_leader(partial(_advance, batch, answers, on_finished))
                served, limit = self._next(requests)
                if not limit:
                    return self._replicas.from_leader(lambda: batch.completions if batch else [])
                if self._anywhere(stop()):
                    return []
                completions = self._engine.generate(
                    [requests[i].tokens for i in served],
                    [requests[i].seed for i in served],
                    replace(sampling, max_tokens=limit),
                    None,
                    stop,
                    [requests[i].start for i in served],
                )
                if self._anywhere(stopped):
                    return []
                answers = dict(zip(served, completions, strict=True))
        finally:
            if batch is not None:
                batch.close()

    def _next(self, requests: Sequence[Request]) -> tuple[list[int], int]:
        """Which requests the ranks that generate in step serve next, with how many tokens; 0 if none waits on any.

        A call has one limit, and an engine may refuse one beyond the context that it has for a request. Those that want
        more than half as much as the longest get what the shortest of them wants; the others wait for a later call.
        """
        longest = self._agreed(max((request.limit for request in requests), default=0), dist.ReduceOp.MAX)
        served = [number for number, request in enumerate(requests) if 2 * request.limit > longest]
        shortest = min((requests[number].limit for number in served), default=longest)
        return served, self._agreed(shortest, dist.ReduceOp.MIN)

    def _agreed(self, value: int, op: dist.ReduceOp.RedOpType) -> int:
        agreed = torch.tensor(value, device=self._replicas.device)
        for group in self.in_step:
            dist.all_reduce(agreed, op, group=group)
        return int(agreed)

    def _anywhere(self, stopped: bool) -> bool:
        """Whether a signal has reached any of the context-parallel ranks, which do not generate in step."""
        heard = torch.tensor(int(stopped), device=self._replicas.device)
        if self._replicas.context.size() > 1:
            dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._replicas.context)
        return bool(heard)

    def _from_leader[T](self, make: Callable[[], T]) -> T:
        """As Replicas.from_leader, and a UserError on the leader is one on all of its replica's ranks."""

        def outcome() -> T | UserError:
            try:
                return make()
            except UserError as error:
                return error

        result = self._replicas.from_leader(outcome)
        if isinstance(result, UserError):
            raise result
        return result


def _advance(
    batch: Conversations | None, answers: Mapping[int, Completion], on_finished: ProgressCallback | None
) -> list[Request]:
    assert batch is not None  # on a leader
    before = batch.finished
    requests = batch.advance(answers)
    if on_finished is not None and batch.finished > before:
        on_finished(batch.finished - before)
    return requests


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop that runs in a thread of its own for as long as the process lives: what a function opens outlasts a batch.

    A function that blocks it keeps neither the trainer nor, the thread being a daemon, its end from going on.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollout functions", daemon=True).start()
    return loop

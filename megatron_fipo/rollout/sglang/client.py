"""Many completions from many servers: each asked of one, and asked again elsewhere until a whole answer has come."""

import asyncio
import logging
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import aiohttp

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.engine import Completion, SamplingParams
from megatron_fipo.rollout.sglang.answer import Answer, Question
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.health import DEFAULT_DEADLINES, Deadlines, Health
from megatron_fipo.rollout.sglang.server import (
    MalformedAnswer,
    Server,
    ServerLost,
    ServerRefused,
    json_object,
    open_session,
)

log = logging.getLogger(__name__)


class RolloutFailed(Exception):
    """A completion cannot be had: no server is left, or every one that was asked failed."""


_KIND = {ServerLost: "lost", ServerRefused: "refused", MalformedAnswer: "malformed"}


@dataclass(frozen=True)
class Faults:
    """Answers that had to be asked for again, by kind; ``redispatched`` of these were asked of another server."""

    lost: int = 0
    refused: int = 0
    malformed: int = 0
    redispatched: int = 0


class Client:
    """Generates on the servers that the fleet has admitted. One for each data-parallel replica; all use all servers."""

    def __init__(
        self,
        fleet: Fleet,
        vocab_size: int,
        max_running: int,
        replica: int = 0,
        deadlines: Deadlines = DEFAULT_DEADLINES,
    ):
        """``max_running`` completions are asked for at once. ``replica`` decides where to begin, so that the replicas
        load the servers evenly."""
        self.fleet, self._vocab_size, self._max_running = fleet, vocab_size, max_running
        first = replica % len(fleet.servers)
        self._order = fleet.servers[first:] + fleet.servers[:first]
        self._deadlines = deadlines
        self._faults: Counter[str] = Counter()

    @property
    def faults(self) -> Faults:
        """Since the start."""
        return Faults(**self._faults)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: Callable[[int], None],
    ) -> list[Completion]:
        """One completion for each (prompt, seed), in order.

        Raises UserError for a token id outside the vocabulary (it would kill a server), RolloutFailed.
        """
        for prompt in set(map(tuple, prompts)):
            if not prompt or min(prompt) < 0 or max(prompt) >= self._vocab_size:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens with ids up to {max(prompt, default=-1)} does not fit a "
                    f"vocabulary of {self._vocab_size}: the tokenizer is not the one of --hf-model"
                )
        name = secrets.token_hex(8)
        questions = [
            Question(f"{name}-{i}", tuple(prompt), seed, sampling)
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        async with open_session() as session:
            batch = _Batch(self.fleet, self._order, session, self._vocab_size, self._deadlines, self._faults)
            slots = asyncio.Semaphore(self._max_running)

            async def complete(question: Question) -> Completion:
                async with slots:
                    completion = await batch.complete(question)
                on_finished(1)
                return completion

            async with batch.health.watching():
                tasks = [asyncio.create_task(complete(question)) for question in questions]
                try:
                    return await asyncio.gather(*tasks)
                finally:  # closed connections make the servers abort what is still running
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)


class _Batch:
    """The state of one call of `Client.generate`."""

    def __init__(
        self,
        fleet: Fleet,
        order: Sequence[Server],
        session: aiohttp.ClientSession,
        vocab_size: int,
        deadlines: Deadlines,
        faults: Counter[str],
    ):
        self._fleet, self._order, self._session, self._vocab_size = fleet, order, session, vocab_size
        self._deadlines, self._faults = deadlines, faults
        self._version = fleet.version
        self._home: dict[tuple[int, ...], Server] = {}
        self.health = Health(fleet, deadlines)

    async def complete(self, question: Question) -> Completion:
        """Ask until there is a whole answer. Raises RolloutFailed."""
        attempts = failures = 0
        server: Server | None = None
        avoid: Server | None = None
        while True:
            attempts += 1
            before, server = server, self._choose(question.prompt, avoid)
            self._faults["redispatched"] += before not in (None, server)
            try:
                # A server refuses a name that it still works on, as it does for seconds after a connection broke.
                return await self._ask(server, replace(question, rid=f"{question.rid}.{attempts}"))
            except (ServerLost, ServerRefused, MalformedAnswer) as error:
                failure = error
            if isinstance(failure, ServerRefused) and failure.status in (400, 404, 413, 422):
                raise RolloutFailed(f"{server} refuses a request as wrong in itself: {failure}") from failure
            self._faults[next(kind for fault, kind in _KIND.items() if isinstance(failure, fault))] += 1
            self.health.failed(server, failure)
            if not self._fleet.serves(server, self._version):
                avoid = None  # condemned: it was not the question's fault, and others can be asked at once
                continue
            log.warning("%s: asked again after %s: %s", server, type(failure).__name__, failure)
            avoid, failures = server, failures + 1
            if failures == self._deadlines.attempts:
                raise RolloutFailed(
                    f"no whole answer in {failures} attempts; the last: {server}: {failure}"
                ) from failure
            await asyncio.sleep(self._deadlines.backoff_s * 2**failures * random.random())

    def _choose(self, prompt: tuple[int, ...], avoid: Server | None) -> Server:
        """The server that has this prompt in its cache, else the one with least to do."""
        serving = self._fleet.serving()
        if not serving:
            raise RolloutFailed(
                f"no server is left that holds the weights of step {self._version} ({self._fleet.reasons()})"
            )
        home = self._home.get(prompt)
        if home not in serving or home is avoid:
            others = [server for server in self._order if server in serving and server is not avoid] or serving
            home = self._home[prompt] = min(others, key=self.health.running)
        return home

    async def _ask(self, server: Server, question: Question) -> Completion:
        answer = Answer(question, self._vocab_size, str(self._version))
        with self.health.request(server) as request:
            async with request.scope, server.open(self._session, "POST", "/generate", json=question.body()) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        finished = answer.add(json_object(line[len(b"data: ") :]))
                        request.sign_of_life()
                        if finished:
                            break
            completion = answer.completion()
            if not self._fleet.serves(server, self._version):
                raise ServerLost("condemned while it answered")
            request.succeeded()
        return completion

"""The verifiers' process: forks a worker for a few answers, reads its scores, kills it if one takes too long.

Started by pool.py as ``python -m megatron_fipo.rewards``, without torch, Megatron, threads or the trainer's
environment, so that a fork is cheap and safe. A worker has its answers in memory when it is forked, and says nothing
but scores, as lines of JSON. What it breaks dies with it: if a built-in verifier dies, the other answers of its worker
go on in a new one; a user's function has a worker for every call, so one that patches a module changes no other score.
"""

import contextlib
import gc
import json
import math
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megatron_fipo.errors import UserError
from megatron_fipo.rewards import confine, verify
from megatron_fipo.rewards.functions import SOURCE, RewardFunction, Score, failure
from megatron_fipo.rewards.response import Response

_ANSWERS_PER_WORKER = 64
_LONGEST_LINE = 1 << 20
_ASYNC_GRACE = 0.5
"""Seconds in which an async function's worker reports which of its calls ran out of time."""


@dataclass(frozen=True)
class Settings:
    """``names`` of functions, or "source"; ``workers`` at a time; seconds of ``timeout`` for a call.

    ``sources`` are those whose verifiers will be needed; others are loaded when they come.
    """

    names: tuple[str, ...]
    workers: int
    timeout: float
    network: bool
    sources: frozenset[str]


@dataclass(frozen=True)
class _Call:
    """The responses, by number, that one call of function ``name`` scores."""

    name: str
    numbers: tuple[int, ...]


class _Worker:
    """A forked process with the calls that it has not answered."""

    def __init__(self, pid: int, calls: deque[_Call], timeout: float):
        self.pid, self.calls, self._timeout = pid, calls, timeout
        self._received = b""
        self.deadline = time.monotonic() + timeout

    def read(self, fd: int) -> Iterator[tuple[_Call, list[Score]]]:
        """The calls that are answered by what stands in the pipe. Raises ValueError if it holds no scores."""
        data = os.read(fd, 1 << 16)
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines[: len(self.calls)]:
            scores = [_checked(*pair) for pair in json.loads(line)]
            if len(scores) != len(self.calls[0].numbers):
                raise ValueError("scores of another number of responses")
            yield self.calls.popleft(), scores
            self.deadline = time.monotonic() + self._timeout
        if not data or len(self._received) > _LONGEST_LINE:
            raise ValueError("the process ended")

    def kill(self) -> str:
        """End the process and its group; how it ended, if it already had."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # killed before it made its group
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _checked(score: float, error: str | None) -> Score:
    if not (isinstance(score, int | float) and math.isfinite(score) and isinstance(error, str | None)):
        raise ValueError("no score")
    return float(score), error


class Server:
    """Scores batches of responses."""

    def __init__(self, settings: Settings):
        """Raises UserError if a function cannot be loaded."""
        self._settings = settings
        self._functions = {name: RewardFunction.load(name) for name in settings.names if name != SOURCE}
        self._loaded: set[str] = set()

    def load(self, sources: Iterable[str]) -> None:
        """Import what verifies the sources, so that workers find it in their memory."""
        if new := set(sources) - self._loaded:
            for source in new:
                verify.load(source)
            self._loaded |= new
            gc.collect()
            gc.freeze()  # what is loaded stays shared with the workers

    def score(
        self, responses: Sequence[Response], groups: Sequence[int], names: Sequence[str]
    ) -> dict[str, list[Score]]:
        """Every response's score by every name; responses to one prompt have the same number in ``groups``."""
        if SOURCE in names:
            self.load({r.source for r in responses})
        scores: dict[str, list[Score]] = {name: [(0.0, None)] * len(responses) for name in names}
        waiting = deque(calls for name in scores for calls in self._divide(name, groups))
        with selectors.DefaultSelector() as selector:
            while waiting or selector.get_map():
                while waiting and len(selector.get_map()) < self._settings.workers:
                    self._start(waiting.popleft(), responses, selector)
                self._wait(selector, scores, waiting)
        return scores

    def _divide(self, name: str, groups: Sequence[int]) -> Iterator[deque[_Call]]:
        """The calls of each worker."""
        if name == SOURCE:
            size = min(_ANSWERS_PER_WORKER, math.ceil(len(groups) / self._settings.workers))
            for start in range(0, len(groups), max(1, size)):
                yield deque(_Call(name, (i,)) for i in range(start, min(start + size, len(groups))))
        elif self._functions[name].together:
            members: dict[int, list[int]] = {}
            for i, group in enumerate(groups):
                members.setdefault(group, []).append(i)
            yield from (deque([_Call(name, tuple(numbers))]) for numbers in members.values())
        else:
            yield from (deque([_Call(name, (i,))]) for i in range(len(groups)))

    def _start(self, calls: deque[_Call], responses: Sequence[Response], selector: selectors.BaseSelector) -> None:
        function = self._functions.get(calls[0].name)
        timeout = self._settings.timeout + (_ASYNC_GRACE if function and function.asynchronous else 0.0)
        parent = os.getpid()
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                confine.die_with_parent(parent)
                self._work(calls, responses, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        selector.register(read_end, selectors.EVENT_READ, _Worker(pid, calls, timeout))

    def _work(self, calls: deque[_Call], responses: Sequence[Response], pipe: int) -> None:
        """In the worker: answer the calls. Ends the process."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        os.dup2(pipe, 3)
        os.closerange(4, 1 << 20)  # the trainer's pipe among them
        confine.limit_resources()
        if confine.available():
            confine.deny_processes(network=self._settings.network)
        with os.fdopen(3, "wb") as out:
            for call in calls:
                scores = self._call(call.name, [responses[i] for i in call.numbers])
                out.write(json.dumps(scores).encode() + b"\n")
                out.flush()
            os._exit(0)

    def _call(self, name: str, responses: Sequence[Response]) -> list[Score]:
        try:
            if name == SOURCE:
                return [(verify.score(response), None) for response in responses]
            return self._functions[name].score(responses, self._settings.timeout)
        except BaseException as error:  # a verifier may raise anything, SystemExit and MemoryError included
            return [failure(error)] * len(responses)

    def _wait(
        self, selector: selectors.BaseSelector, scores: dict[str, list[Score]], waiting: deque[deque[_Call]]
    ) -> None:
        """Wait for scores or for the next deadline; end workers that are done, dead or late."""
        running: dict[int, _Worker] = {key.fd: key.data for key in selector.get_map().values()}
        next_deadline = min(worker.deadline for worker in running.values())
        readable = {key.fd for key, _ in selector.select(max(0.0, next_deadline - time.monotonic()))}
        for fd, worker in running.items():
            broken = False
            try:
                for call, values in worker.read(fd) if fd in readable else ():
                    for number, value in zip(call.numbers, values, strict=True):
                        scores[call.name][number] = value
            except (ValueError, TypeError, OverflowError, RecursionError):  # a user's function may write anything there
                broken = True
            late = time.monotonic() > worker.deadline
            if worker.calls and not broken and not late:
                continue
            selector.unregister(fd)
            os.close(fd)
            how = worker.kill()
            if worker.calls:
                failed = worker.calls.popleft()
                reason = f"the process ended without a verdict ({how})" if broken else "no verdict in time"
                for number in failed.numbers:
                    scores[failed.name][number] = (0.0, reason)
            if worker.calls:
                waiting.appendleft(worker.calls)


def main() -> None:
    """Answer the trainer's requests until it closes the pipe."""
    connection = Connection(int(sys.argv[1]))
    confine.die_with_parent(int(sys.argv[2]))
    # They reach every process of a terminal or a job; the trainer, which may want to finish a step, decides.
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(asked, signal.SIG_IGN)
    try:
        settings = connection.recv()
        server = Server(settings)
    except UserError as error:
        connection.send(error)
        return
    connection.send(confine.available())
    server.load(settings.sources)  # while the trainer starts
    with contextlib.suppress(EOFError):  # the trainer has ended
        while True:
            connection.send(server.score(*connection.recv()))

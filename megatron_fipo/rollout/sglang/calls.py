"""HTTP calls that run beside the main thread, which meanwhile exports weights and broadcasts them."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any

from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerLost, ServerRefused

Answer = dict[str, Any]

_FAULTS = (ServerLost, ServerRefused, MalformedAnswer)


class Calls:
    """An event loop in a thread of its own, for calls to servers of ``fleet``. Every call must have a deadline."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight sync calls", daemon=True).start()

    def start(self, call: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def start_all(
        self, servers: Iterable[Server], call: Callable[[Server], Coroutine[Any, Any, Answer]]
    ) -> "dict[Server, Future[Answer]]":
        return {server: self.start(call(server)) for server in servers}

    def each(
        self, servers: Iterable[Server], step: str, call: Callable[[Server], Coroutine[Any, Any, Answer]]
    ) -> dict[Server, Answer]:
        """Answers of the servers that gave one, in order; the others are condemned."""
        return self.collect(self.start_all(servers, call), step)

    def collect(self, answers: "dict[Server, Future[Answer]]", step: str) -> dict[Server, Answer]:
        """Wait for all of them; as `each`."""
        for server, answer in answers.items():
            if error := fault(answer):
                self.condemn(server, step, error)
        return {server: answer.result() for server, answer in answers.items() if not failed(answer)}

    def condemn(self, server: Server, step: str, error: Exception | str) -> None:
        """With the server's own words; one that does not answer is killed, where this process can."""
        if isinstance(error, ServerLost):
            server.kill()
        tail = server.log_tail()
        self._fleet.condemn(server, f"{step}: {error}" + (f"\nthe end of its log:\n{tail}" if tail else ""))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def fault(future: "Future[Answer]") -> Exception | None:
    """What was the server's fault in a call; waits for its end. Raises whatever else went wrong."""
    wait([future])
    error = future.exception()
    if error is None or isinstance(error, _FAULTS):
        return error
    raise error


def failed(future: "Future[Answer]") -> bool:
    """Whether a call has already ended without an answer."""
    return future.done() and future.exception() is not None

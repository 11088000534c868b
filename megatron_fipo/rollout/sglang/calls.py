"""HTTP calls that run beside the main thread, which meanwhile exports weights and broadcasts them."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any

from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerLost, ServerRefused

Answer = dict[str, Any]

_FAULTS = (ServerLost, ServerRefused, MalformedAnswer)


class Calls:
    """An event loop in a thread of its own. Every call must have a deadline of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight sync calls", daemon=True).start()

    def start(self, call: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def start_all(
        self, servers: Iterable[Server], call: Callable[[Server], Coroutine[Any, Any, Answer]]
    ) -> "dict[Server, Future[Answer]]":
        return {server: self.start(call(server)) for server in servers}

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

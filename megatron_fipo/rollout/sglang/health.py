"""Which servers still work, judged by the tokens that they send: a probe only explains a silence.

A server with requests that has sent nothing for `Deadlines.stall_s` is asked for a token of its own:
- no answer: it is condemned, and all that it was asked for is asked elsewhere;
- it answers and holds no request: the answers were lost on the way, and are asked for again;
- it answers and holds requests: it is slow, or the requests of other trainers go first. It is kept until it has been
  silent `Deadlines.patience` times as long (three times that if no other server does better): it works, but not for us.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass

import aiohttp

from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerLost, ServerRefused


@dataclass(frozen=True)
class Deadlines:
    """In seconds. ``attempts`` answers of servers in good standing may fail before a completion is given up;
    ``strikes`` failed answers in a row condemn a server."""

    stall_s: float = 60.0
    probe_s: float = 30.0
    patience: int = 10
    attempts: int = 6
    strikes: int = 4
    backoff_s: float = 0.1


DEFAULT_DEADLINES = Deadlines()


class GivenUp(ServerLost):
    """The watch has ended a request."""


class Request:
    """One request on its way. ``scope`` ends it when the server is given up."""

    def __init__(self, state: "_State"):
        self._state = state
        self.scope = asyncio.timeout(None)

    def sign_of_life(self) -> None:
        """Tokens have come."""
        now = time.monotonic()
        self._state.longest_gap = max(self._state.longest_gap, now - self._state.last_sign)
        self._state.last_sign = now

    def succeeded(self) -> None:
        """The whole answer has come, and it was good."""
        self._state.strikes = 0


class _State:
    def __init__(self) -> None:
        self.requests: set[Request] = set()
        self.last_sign = 0.0
        self.longest_gap = 0.0
        self.strikes = 0
        self.probe: asyncio.Task[None] | None = None


class Health:
    """Evidence about the servers during one batch; condemns in the fleet."""

    def __init__(self, fleet: Fleet, deadlines: Deadlines):
        self._fleet, self._deadlines = fleet, deadlines
        self._states = {server: _State() for server in fleet.servers}

    def running(self, server: Server) -> int:
        """Requests on their way."""
        return len(self._states[server].requests)

    @contextlib.contextmanager
    def request(self, server: Server) -> Iterator[Request]:
        """Account for one request. Raises ServerLost in place of the timeout with which it was given up."""
        state = self._states[server]
        if not state.requests:
            state.last_sign = time.monotonic()
        request = Request(state)
        state.requests.add(request)
        try:
            yield request
        except TimeoutError as error:
            silence = time.monotonic() - state.last_sign
            raise GivenUp(f"{server}: given up after {silence:.1f} s of silence") from error
        finally:
            state.requests.discard(request)

    def failed(self, server: Server, error: Exception) -> None:
        """An answer did not come or was bad."""
        state = self._states[server]
        state.strikes += not isinstance(error, GivenUp)  # these count together, as the one incident that they are
        cause = error.__cause__
        if not server.alive():
            self._condemn(server, f"its process ended ({error})")
        elif isinstance(cause, aiohttp.ClientConnectorError) and isinstance(cause.os_error, ConnectionRefusedError):
            self._condemn(server, f"nothing listens there ({error})")
        elif isinstance(error, ServerRefused) and error.status in (401, 403):
            self._condemn(server, f"it does not take our key ({error})")
        elif state.strikes >= self._deadlines.strikes:
            self._condemn(server, f"{state.strikes} failed answers in a row, the last: {error}")

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look for silent servers meanwhile."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            tasks = [watch, *(state.probe for state in self._states.values() if state.probe)]
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(0.5, self._deadlines.stall_s / 4))
            for server, state in self._states.items():
                if not state.requests or (state.probe and not state.probe.done()):
                    continue
                if not server.alive():
                    self._condemn(server, "its process ended")
                elif self._silence(state) > max(self._deadlines.stall_s, 4 * state.longest_gap):
                    state.probe = asyncio.create_task(self._examine(server, state))

    async def _examine(self, server: Server, state: _State) -> None:
        silent_since, suspects = state.last_sign, set(state.requests)
        try:
            await server.get("/health_generate", self._deadlines.probe_s)
            loads = (await server.get("/v1/loads", self._deadlines.probe_s))["loads"]
            held = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        except (ServerLost, ServerRefused, MalformedAnswer, KeyError, TypeError) as error:
            if state.last_sign == silent_since:
                self._condemn(server, f"no token for {self._silence(state):.0f} s, and none on request ({error})")
            return
        if held == 0:
            await asyncio.sleep(self._deadlines.stall_s / 4)  # answers that have just ended are still on their way
        if state.last_sign > silent_since:
            return
        if held == 0:
            state.strikes += 1
            self._give_up(suspects & state.requests)
            return
        limit = self._deadlines.patience * self._deadlines.stall_s
        if self._silence(state) > (limit if self._others_progress(state) else 3 * limit):
            self._condemn(server, f"healthy, but no token of {held} requests for {self._silence(state):.0f} s")

    def _silence(self, state: _State) -> float:
        return time.monotonic() - state.last_sign

    def _others_progress(self, state: _State) -> bool:
        """Some other server has sent tokens since, or is at leisure to take the work over."""
        others = (
            other for server, other in self._states.items() if other is not state and server in self._fleet.serving()
        )
        return any(not other.requests or other.last_sign > state.last_sign for other in others)

    def _condemn(self, server: Server, reason: str) -> None:
        self._fleet.condemn(server, reason)
        self._give_up(self._states[server].requests)

    def _give_up(self, requests: Collection[Request]) -> None:
        """End them at once; whoever waits for one asks elsewhere."""
        for request in requests:
            if not request.scope.expired():
                request.scope.reschedule(0.0)

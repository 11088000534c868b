"""One SGLang server: how to reach it, and what can go wrong with a request."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fipo.rollout.sglang.process import Process

CONNECT_S = 5.0
"""A server's kernel accepts a connection at once, however busy the server is."""


class ServerLost(Exception):
    """No answer, or half of one: refused, reset, closed or overdue. The server may be gone, or only this answer."""


class MalformedAnswer(Exception):
    """An answer that cannot be what was asked for."""


class ServerRefused(Exception):
    """An answer that says no, with its HTTP status and text."""

    def __init__(self, status: int, text: str):
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


@dataclass(frozen=True)
class ServerAddress:
    """How to reach one server. The keys are this run's secrets: never log them."""

    url: str
    api_key: str
    admin_key: str


class Server:
    """A server as its clients see it. Every rank has one for each server; only the starter's has a process.

    Safe to use from several event loops: it keeps no connection.
    """

    def __init__(self, name: str, address: ServerAddress, process: Process | None = None):
        self.name, self.address, self.process = name, address, process

    def __repr__(self) -> str:
        return self.name

    @property
    def pid(self) -> int | None:
        """Process id, None for a server that another process started."""
        return self.process.pid if self.process else None

    @property
    def log_path(self) -> Path | None:
        return self.process.log_path if self.process else None

    def alive(self) -> bool:
        """False if its process is known to have ended. True says little: a stopped server is alive."""
        return self.process is None or self.process.alive()

    def kill(self) -> None:
        """End it, if this process started it."""
        if self.process:
            self.process.kill()

    def restart(self) -> None:
        """End it and start it again at the same address, if this process started it; does not wait for it."""
        if self.process:
            self.process = self.process.again()

    def log_tail(self) -> str:
        """The end of its log, "" if the log is elsewhere."""
        return self.process.log_tail() if self.process else ""

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, deadline_s: float = 60.0, admin: bool = False
    ) -> dict[str, Any]:
        """POST JSON and return the JSON object of the answer ({"text": ...} for an answer in plain text).

        ``admin`` sends the admin key, which everything but generating needs.
        Raises ServerLost, ServerRefused, MalformedAnswer.
        """
        return await self._ask("POST", path, deadline_s, admin, json=dict(body or {}))

    async def get(self, path: str, deadline_s: float = 60.0) -> dict[str, Any]:
        """GET; otherwise as `post`."""
        return await self._ask("GET", path, deadline_s, admin=False)

    @asynccontextmanager
    async def open(
        self, session: aiohttp.ClientSession, method: str, path: str, admin: bool = False, **request: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer to be read, whose failures are ServerLost and whose status is below 400 (else ServerRefused)."""
        key = self.address.admin_key if admin else self.address.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with session.request(method, self.address.url + path, headers=headers, **request) as response:
                if response.status >= 400:
                    raise ServerRefused(response.status, (await response.text(errors="replace"))[:2000])
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.name} {path}: {type(error).__name__} {error}") from error

    async def _ask(self, method: str, path: str, deadline_s: float, admin: bool, **request: Any) -> dict[str, Any]:
        try:
            async with (
                asyncio.timeout(deadline_s),
                open_session() as session,
                self.open(session, method, path, admin, **request) as response,
            ):
                text = await response.text(errors="replace")
                is_json = response.content_type == "application/json"
        except TimeoutError as error:
            raise ServerLost(f"{self.name} {path}: no answer in {deadline_s:g} s") from error
        return json_object(text) if is_json else {"text": text}


def open_session() -> aiohttp.ClientSession:
    """A connection for each request: one that was kept open may be closed by the server just as it is used again."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0), timeout=timeout)


def json_object(text: str | bytes) -> dict[str, Any]:
    """Raises MalformedAnswer."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise MalformedAnswer(f"invalid JSON ({error}): {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise MalformedAnswer(f"a JSON {type(value).__name__} instead of an object: {text[:200]!r}")
    return value

"""A proxy before a real server that spoils chosen answers, and counts what it spoiled."""

import asyncio
import contextlib
import json
import threading

import aiohttp
from aiohttp import web

STATUS_FAULTS = ("500", "half-open", "reset in mid-body")
"""Faults of the connection; the others are in `spoil`."""


def spoil(kind: str, events: list[dict], other: list[dict]) -> list[bytes]:
    """The events of one answer with one fault in them; ``other`` is the answer to an earlier request."""
    first, last = events[0], events[-1]
    match kind:
        case "invalid JSON":
            return [b'{"output_ids": [17,', *map(_line, events[1:])]
        case "empty output":
            last["output_ids"], last["meta_info"]["output_token_logprobs"] = [], []
            last["meta_info"]["completion_tokens"] = 0
            events = [last]
        case "NaN log-prob":
            first["meta_info"]["output_token_logprobs"][0][0] = float("nan")
        case "null log-prob":
            first["meta_info"]["output_token_logprobs"][0][0] = None
        case "another request's tokens":
            events = other
        case "log-probs of other tokens":
            last["meta_info"]["output_token_logprobs"][-1][1] ^= 1
        case "token outside the vocabulary":
            last["output_ids"][-1] = last["meta_info"]["output_token_logprobs"][-1][1] = 10**6
        case "cut short":
            events = events[:-1]
        case "fewer tokens than said":
            events = events[1:]
        case "stale weights":
            last["meta_info"]["weight_versions"][0]["version"] = "41"
        case "aborted":
            last["meta_info"]["finish_reason"] = {"type": "abort", "message": "by the test"}
        case _:
            raise ValueError(kind)
    return [_line(event) for event in events]


EVENT_FAULTS = (
    "invalid JSON", "empty output", "NaN log-prob", "null log-prob", "another request's tokens",
    "log-probs of other tokens", "token outside the vocabulary", "cut short", "fewer tokens than said", "stale weights",
    "aborted",
)  # fmt: skip


def _line(event: dict) -> bytes:
    return json.dumps(event).encode()


class FaultyProxy:
    """Spoils ``faults`` answers of /generate in the way that ``kind`` names; everything else passes.

    ``spoiled`` counts them, ``requests`` all requests to generate; ``delay_s`` holds back every event.
    """

    def __init__(self, upstream: str):
        self.upstream, self.kind, self.faults, self.delay_s = upstream, "", 0, 0.0
        self.spoiled, self.requests = 0, 0
        self._last_answer: list[dict] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = self._run(self._start())

    def close(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> str:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        kind = self._fault(request)
        if kind == "500":
            return web.Response(status=500, text="Internal Server Error")
        if kind == "half-open":
            await asyncio.sleep(3600)
        headers = {"Authorization": request.headers.get("Authorization", ""), "Content-Type": "application/json"}
        target, body = self.upstream + request.path_qs, await request.read()
        async with self._session.request(request.method, target, headers=headers, data=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            with contextlib.suppress(ConnectionResetError):  # the client hangs up once it has what it wants
                await self._answer(request, kind, answer, response)
        return response

    async def _answer(
        self, request: web.Request, kind: str, answer: aiohttp.ClientResponse, response: web.StreamResponse
    ) -> None:
        events: list[dict] = []
        async for line in answer.content:
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
                await asyncio.sleep(self.delay_s)
                if not kind and "error" not in events[-1] and events[-1]["meta_info"]["finish_reason"]:
                    self._last_answer = events
            if kind == "reset in mid-body" and events:
                await response.write(line[:40])
                request.transport.abort()
            elif kind not in EVENT_FAULTS:
                await response.write(line)
        if kind in EVENT_FAULTS:
            for line in spoil(kind, events, self._last_answer):
                await response.write(b"data: " + line + b"\n\n")
        await response.write_eof()

    def _fault(self, request: web.Request) -> str:
        if request.path != "/generate":
            return ""
        self.requests += 1
        if self.faults == 0:
            return ""
        self.faults -= 1
        self.spoiled += 1
        return self.kind

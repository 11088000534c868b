"""The SGLang client against a bare HTTP loop, and how fast the work of a killed server is given to another.

    make sglang && .venv/bin/python tools/benchmark_rollout.py [--json FILE]

`client_over_bare`: tokens per second of 64 concurrent requests through the client, whose answers are streamed, watched
and checked, over those of a loop that posts the same requests and only parses the answers; medians of alternating
rounds. `redispatch_idle_s`, `redispatch_serving_s`: seconds until the last request to a dead server has been sent to
another, p95 over kills; from the start of the batch if it died idle, from the kill if it died generating. What is
killed is a relay before a real server, by SIGKILL: its sockets close like a server's, and another starts in a moment.
A real server of a tiny random model on this machine; a few minutes.
"""

import argparse
import asyncio
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import torch
import transformers
from benchmarks.measure import write_report

from megatron_fipo.observe.environment import describe_environment
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.sglang.client import Client
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.server import Server, ServerAddress
from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers

VOCABULARY, PROMPT_TOKENS, CONCURRENT = 512, 32, 64
SAMPLING = SamplingParams(max_tokens=64)

RELAY = """
import asyncio, sys
async def pump(reader, writer):
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
    writer.close()
async def relay(reader, writer):
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer), return_exceptions=True)
async def main():
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def write_model(folder: Path) -> None:
    """A tiny random Qwen2 that never ends a response by itself."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(VOCABULARY, (count, PROMPT_TOKENS), generator=generator).tolist()]


async def ask_bare(server: Server, batch: list[tuple[int, ...]]) -> None:
    """The same requests with nothing around them."""
    slots = asyncio.Semaphore(CONCURRENT)
    headers = {"Authorization": f"Bearer {server.address.api_key}"}

    async def ask(session: aiohttp.ClientSession, prompt: tuple[int, ...]) -> None:
        sampling = {"max_new_tokens": SAMPLING.max_tokens, "temperature": 1.0}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        async with slots, session.post(server.address.url + "/generate", json=body, headers=headers) as response:
            answer = await response.json()
            assert len(answer["output_ids"]) == SAMPLING.max_tokens

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, prompt) for prompt in batch))


def compare_throughput(server: Server, rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """Tokens per second of the client over those of the bare loop."""
    client = Client(fleet_of(server), VOCABULARY, CONCURRENT)
    seconds: dict[str, list[float]] = {"client": [], "bare": []}
    for i in range(rounds + 1):
        batch = prompts(4 * CONCURRENT, seed=i)
        calls = {
            "client": lambda batch=batch: client.generate(batch, range(len(batch)), SAMPLING, lambda n: None),
            "bare": lambda batch=batch: ask_bare(server, batch),
        }
        for name in sorted(calls, reverse=i % 2 == 1):
            start = time.perf_counter()
            asyncio.run(calls[name]())
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    tokens = 4 * CONCURRENT * SAMPLING.max_tokens
    rows = [
        {"case": "64 concurrent requests", "name": name, "tokens_per_s": tokens / statistics.median(times)}
        for name, times in seconds.items()
    ]
    ratio = statistics.median(b / c for b, c in zip(seconds["bare"], seconds["client"], strict=True))
    return ratio, rows


class WatchedServer(Server):
    """Remembers when it was asked for which completion."""

    def __init__(self, name: str, address: ServerAddress):
        super().__init__(name, address)
        self.asked: dict[str, float] = {}

    def open(
        self, session: aiohttp.ClientSession, method: str, path: str, admin: bool = False, **request: Any
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if path == "/generate":
            self.asked[request["json"]["rid"]] = time.monotonic()
        return super().open(session, method, path, admin, **request)


def redispatch_seconds(server: Server, *, serving: bool, seed: int) -> float:
    """Kill one of two servers; seconds until its last request has been sent to the other."""
    port = server.address.url.rpartition(":")[2]
    relay = subprocess.Popen([sys.executable, "-c", RELAY, port], stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    victim_url = f"http://127.0.0.1:{int(relay.stdout.readline())}"
    address = server.address
    keeper = WatchedServer("keeper", address)
    victim = WatchedServer("victim", ServerAddress(victim_url, address.api_key, address.admin_key))
    client = Client(fleet_of(victim, keeper), VOCABULARY, CONCURRENT)
    killed = [time.monotonic()]

    def kill() -> None:
        killed[0] = time.monotonic()
        relay.send_signal(signal.SIGKILL)
        relay.wait()

    if serving:
        threading.Timer(0.3, kill).start()
    else:
        kill()
    batch = prompts(CONCURRENT, seed)
    start = time.monotonic()
    completions = asyncio.run(client.generate(batch, range(len(batch)), SamplingParams(128), lambda n: None))
    assert len(completions) == len(batch) and client.faults.lost > 0
    moved = [keeper.asked[rid] for rid in victim.asked if rid in keeper.asked]
    return max(moved) - (killed[0] if serving else start)


def fleet_of(*servers: Server) -> Fleet:
    fleet = Fleet(servers)
    fleet.begin_update(0)
    for server in servers:
        fleet.admit(server)
    return fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    logging.disable()  # every kill would be told
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        settings = StartSettings(str(Path(folder) / "model"), 1, (), "float32", 0, Path(folder) / "log")
        server = start_servers(settings)[0]
        try:
            label = {"new_version": "0", "abort_all_requests": False}
            asyncio.run(server.post("/update_weight_version", label, admin=True))
            ratio, rows = compare_throughput(server, arguments.rounds)
            times = {
                name: [redispatch_seconds(server, serving=name == "serving", seed=i) for i in range(arguments.kills)]
                for name in ("idle", "serving")
            }
        finally:
            server.kill()
    ratios = {"client_over_bare": ratio}
    for name, seconds in times.items():
        ratios[f"redispatch_{name}_s"] = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
        rows.append(
            {"case": "killed server", "name": name, "median_s": statistics.median(seconds), "max_s": max(seconds)}
        )
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    write_report(arguments.json, ratios, rows, describe_environment())


if __name__ == "__main__":
    main()

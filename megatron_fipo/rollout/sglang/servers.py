"""Servers of a run: started here, one supervised process group each, or attached to by URL."""

import asyncio
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from packaging.version import Version

from megatron_fipo.errors import UserError
from megatron_fipo.model.hf_config import read_hf_config
from megatron_fipo.rollout.sglang import launch, models
from megatron_fipo.rollout.sglang.flags import OLDEST_VERSION, tensor_parallel_size
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.process import Process
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerAddress, ServerLost, ServerRefused

# The key/value cache is bounded by tokens: a small fraction of the memory fails when other processes start meanwhile.
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"),
    *("--mem-fraction-static", "0.8", "--max-total-tokens", "81920", "--max-running-requests", "64"),
)
_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.*")
# Good for the trainer only: one queue serialises SGLang's streams; expandable segments have no CUDA IPC handles for its
# all-reduce, and torch-memory-saver refuses them.
_TRAINER = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_POLL_S = 0.3


@dataclass(frozen=True)
class StartSettings:
    """What servers to start on this node.

    ``flags`` are SGLang's own and win over ours; ``port`` is the first server's (None: any that is free);
    ``first_gpu`` is the first device that no trainer uses.
    """

    model: str
    count: int
    flags: tuple[str, ...]
    dtype: str
    seed: int
    log_folder: Path
    host: str = "127.0.0.1"
    port: int | None = None
    first_gpu: int = 0
    ready_s: float = 900.0


def start_servers(settings: StartSettings) -> list[Server]:
    """Start the servers and wait until they answer.

    Raises UserError, with the log's end, if one cannot start or is not ready in ``settings.ready_s``; nothing of them
    is left then.
    """
    settings.log_folder.mkdir(parents=True, exist_ok=True)
    ports = [_reserve(settings.host, settings.port + i if settings.port else 0) for i in range(settings.count)]
    servers: list[Server] = []
    try:
        for i, port in enumerate(ports):
            servers.append(_start(settings, i, port.getsockname()[1]))
        asyncio.run(_wait_ready(servers, settings.ready_s))
    except BaseException:
        for server in servers:
            server.kill()
        raise
    finally:
        for port in ports:
            port.close()
    return servers


def attach(urls: Sequence[str], api_key: str, admin_key: str) -> list[Server]:
    """Servers that somebody else started. Raises UserError if one does not answer, or is not fit for this."""
    servers = [Server(url, ServerAddress(url.rstrip("/"), api_key, admin_key)) for url in urls]

    async def check_all() -> None:
        await asyncio.gather(*map(_check, servers))

    asyncio.run(check_all())
    return servers


def gather_fleet(started: Sequence[Server]) -> Fleet:
    """Every rank gets to know the servers that any rank has started. Collective over all ranks.

    The keys travel inside the trainer's own process group only.
    """
    mine = [(server.name, server.address) for server in started]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    own = {server.address: server for server in started}
    return Fleet([own.get(address) or Server(name, address) for theirs in everyone for name, address in theirs])


def check_version(version: str, where: str) -> None:
    """Raises UserError for a version with published holes."""
    if Version(version) < Version(OLDEST_VERSION):
        raise UserError(
            f"{where} is SGLang {version}, which lets whoever reaches its sockets run code (CVE-2026-3059, -7301); "
            f"use {OLDEST_VERSION} or newer"
        )


def address_of(host: str) -> str:
    """The IPv4 address of a named interface ("eth0"), or ``host`` itself. Raises UserError for "all interfaces"."""
    interfaces = psutil.net_if_addrs()
    if host in interfaces:
        found = [a.address for a in interfaces[host] if a.family == socket.AF_INET]
        if not found:
            raise UserError(f"--sglang-host {host}: this interface has no IPv4 address; name another")
        return found[0]
    if host in ("0.0.0.0", "::", ""):
        raise UserError(f"--sglang-host {host!r} means every interface; name one of {', '.join(sorted(interfaces))}")
    return host


def server_environment() -> dict[str, str]:
    """This process's environment without what torchrun and the trainer have in it for themselves."""
    return {k: value for k, value in os.environ.items() if k not in _TRAINER and not _TORCHRUN.fullmatch(k)}


def _reserve(host: str, port: int) -> socket.socket:
    """A socket bound to a port and never listening: nobody is given the port meanwhile, and the server can take it.

    (Linux lets two sockets with SO_REUSEADDR share a port as long as neither listens.)
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        what = f"--sglang-port: port {port}" if port else "no free port"
        raise UserError(f"{what} on {host} cannot be used ({error.strerror}); free it or give another") from error
    return reserved


def _start(settings: StartSettings, index: int, port: int) -> Server:
    address = ServerAddress(f"http://{settings.host}:{port}", secrets.token_hex(32), secrets.token_hex(32))
    cuda = torch.cuda.is_available()
    command = [sys.executable, "-m", launch.__name__, "--model-path", settings.model, "--dtype", settings.dtype]
    command += ["--random-seed", str(settings.seed + index), "--skip-tokenizer-init", "--incremental-streaming-output"]
    command += ["--log-level-http", "warning", *(() if cuda else _CPU_FLAGS), *settings.flags]
    command += ["--host", settings.host, "--port", str(port)]

    environment = server_environment()
    environment |= {launch.API_KEY: address.api_key, launch.ADMIN_KEY: address.admin_key, "HF_HUB_OFFLINE": "1"}
    config = read_hf_config(settings.model)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = models.__name__
    if cuda:
        environment["CUDA_VISIBLE_DEVICES"] = _devices(settings, index)
    log_path = settings.log_folder / f"{socket.gethostname()}_{port}.log"
    process = Process.launch(command, environment, log_path)
    return Server(f"server {socket.gethostname()}:{port}", address, process)


def _devices(settings: StartSettings, index: int) -> str:
    """The GPUs of one server, the next as many as it has ranks. Raises UserError if there are not enough."""
    size = tensor_parallel_size(settings.flags)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    first = settings.first_gpu + index * size
    if first + size > len(devices):
        raise UserError(
            f"--sglang-servers {settings.count} of {size} GPUs do not fit beside the {settings.first_gpu} trainer "
            f"ranks of a node with {len(devices)} GPUs; start fewer ranks or fewer servers"
        )
    return ",".join(devices[first : first + size])


async def _wait_ready(servers: Sequence[Server], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s

    async def wait(server: Server) -> None:
        while time.monotonic() < end:
            if not server.alive():
                raise UserError(f"{server} ended while it started; the end of {server.log_path}:\n{server.log_tail()}")
            try:
                await server.get("/health", deadline_s=30)
            except (ServerLost, ServerRefused):  # not listening yet, or 503: loading
                await asyncio.sleep(_POLL_S)
                continue
            return await _check(server)
        raise UserError(
            f"{server} was not ready after {deadline_s:g} s; the end of {server.log_path}:\n{server.log_tail()}"
        )

    await asyncio.gather(*map(wait, servers))


async def _check(server: Server) -> None:
    """The server speaks this protocol and takes our keys. Raises UserError."""
    try:
        info = await server.get("/server_info", deadline_s=30)
        check_version(str(info.get("version")), server.name)
        await server.post("/abort_request", {"rid": "nobody"}, deadline_s=30, admin=True)
    except ServerRefused as error:
        if error.status in (401, 403):
            raise UserError(
                f"{server} does not take our keys (HTTP {error.status}); set SGLANG_API_KEY and SGLANG_ADMIN_API_KEY "
                f"to those that it was started with"
            ) from error
        raise UserError(f"{server} answers like no SGLang server ({error}); check its address") from error
    except (ServerLost, MalformedAnswer) as error:
        raise UserError(f"{server} does not answer ({error}); start it, or give the right address") from error
    if not info.get("incremental_streaming_output"):
        raise UserError(f"{server} was started without --incremental-streaming-output; start it with this flag")

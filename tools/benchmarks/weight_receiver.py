"""A process that takes weights as an SGLang server does, and does nothing else.

    python tools/benchmarks/weight_receiver.py [--sums] < names.json

`names.json` lists the parameters that it claims to have. It prints its port and answers the calls of weight updates:
tensors are rebuilt from names, dtypes and shapes. `/raw_broadcast` receives the same bytes and nothing more. Both
receive into memory that is there already, on a GPU over NCCL. With --sums, `/sums` tells the SHA-256 of every tensor.
"""

import asyncio
import hashlib
import json
import math
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from torch.distributed.distributed_c10d import GroupName, PrefixStore, _new_process_group_helper, _world

TIMEOUT = timedelta(seconds=120)


class Receiver:
    """One method for each call that has something to do."""

    def __init__(self, names: list[str], with_sums: bool) -> None:
        self.names, self.version, self.with_sums = names, "none", with_sums
        self.seen: dict[str, str] = {}
        self.groups: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.device, self.memory = "cpu", torch.empty(0, dtype=torch.uint8)

    def server_info(self) -> dict[str, Any]:
        return {"tp_size": 1, "pp_size": 1}

    def model_info(self) -> dict[str, Any]:
        return {"weight_version": self.version}

    def weights_checker(self, action: str) -> dict[str, Any]:
        return {"ranks": [{"checksums": dict.fromkeys(self.names)}]}

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        store = dist.TCPStore(master_address, master_port, world_size, is_master=False, timeout=TIMEOUT)
        group, _ = _new_process_group_helper(
            world_size, rank_offset, [], dist.Backend(backend), PrefixStore(group_name, store),
            group_name=GroupName(group_name), backend_options=None, timeout=TIMEOUT,
        )  # fmt: skip
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        self.groups[group_name] = group
        self.device = "cuda" if backend == "nccl" else "cpu"

    def update_weights_from_distributed(
        self, names: list, dtypes: list, shapes: list, group_name: str, weight_version: str | None, **_: Any
    ) -> None:
        specs = [(getattr(torch, dtype), shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs]
        data = self._memory(sum(sizes))
        dist.broadcast(data, src=0, group=self.groups[group_name])
        if self.with_sums:
            pieces = zip(names, data.cpu().split(sizes), strict=True)
            self.seen |= {name: hashlib.sha256(piece.numpy()).hexdigest() for name, piece in pieces}
        parts = zip(names, specs, data.split(sizes), strict=True)
        self.tensors |= {name: part.view(dtype).view(shape) for name, (dtype, shape), part in parts}
        self.version = weight_version or self.version

    def sums(self) -> dict[str, str]:
        return self.seen

    def raw_broadcast(self, nbytes: int, group_name: str) -> None:
        data = self._memory(nbytes)
        dist.broadcast(data[:1], src=0, group=self.groups[group_name])  # both are ready
        dist.broadcast(data, src=0, group=self.groups[group_name])

    def _memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that is there already, from the second time on."""
        if len(self.memory) < nbytes:
            self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        return self.memory[:nbytes]


async def serve(receiver: Receiver) -> None:
    async def answer(request: web.Request) -> web.Response:
        work = getattr(receiver, request.path.strip("/"), None)
        body = await request.json() if request.can_read_body else {}
        result = await asyncio.to_thread(work, **body) if work else None
        return web.json_response(result or {"success": True})

    application = web.Application(client_max_size=2**26)
    application.router.add_route("*", "/{call}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Receiver(json.load(sys.stdin), "--sums" in sys.argv)))

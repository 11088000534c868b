"""Our sender's broadcast into another process: over NCCL between two GPUs; over gloo on a machine without a GPU.

The receiver is not SGLang: it takes the same calls and tells what has arrived.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fipo.rollout.sglang.buckets import TensorSpec
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import server_parameter
from megatron_fipo.rollout.sglang.server import Server, ServerAddress
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

GPUS = torch.cuda.device_count()
DEVICE = "cuda:0" if GPUS else "cpu"
RECEIVER = Path(__file__).parents[2] / "tools" / "benchmarks" / "weight_receiver.py"
TENSORS, BUCKET = 40, 64_000
SETTINGS = SyncSettings(bucket_bytes=BUCKET, deadline_s=60.0)

pytestmark = pytest.mark.skipif(GPUS == 1, reason="NCCL between processes needs two GPUs, found 1")


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Of several sizes, one of them larger than a bucket."""
    g = torch.Generator().manual_seed(seed)
    rows = [1 + 37 * i % 90 for i in range(TENSORS - 1)] + [600]
    return {f"w{i}.weight": torch.randn(n, 64, generator=g).bfloat16().to(DEVICE) for i, n in enumerate(rows)}


def layout_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec.of(*pair) for pair in tensors.items()]


class DyingServer(Server):
    """Its process is killed right before its ``nth`` bucket."""

    def __init__(self, server: Server, process: subprocess.Popen, nth: int):
        super().__init__(server.name, server.address)
        self._dies, self._calls_left = process, nth

    async def post(self, path, body=None, deadline_s=60.0, admin=False):
        if path == "/update_weights_from_distributed":
            self._calls_left -= 1
            if self._calls_left == 0:
                self._dies.kill()
        return await super().post(path, body, deadline_s, admin)


@pytest.fixture
def start_receiver():
    """Starts a receiver that can see the last GPU only; returns it as a server, and its process."""
    started = []

    def start() -> tuple[Server, subprocess.Popen]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(GPUS - 1) if GPUS else ""}
        process = subprocess.Popen(
            [sys.executable, str(RECEIVER), "--sums"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        started.append(process)
        json.dump(sorted({server_parameter(name)[0] for name in weights(0)}), process.stdin)
        process.stdin.close()
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        return Server("receiver", ServerAddress(url, "", "")), process

    yield start
    for process in started:
        process.kill()
        process.wait()


def publish(sync: WeightSync, fleet: Fleet, version: int) -> None:
    fleet.begin_update(version)
    sync.publish(version)


def check_received(server: Server, sent: dict[str, torch.Tensor]) -> None:
    received = asyncio.run(server.get("/sums"))
    raw = {name: tensor.view(torch.uint8).cpu().numpy() for name, tensor in sent.items()}
    assert received == {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}


def test_what_is_sent_arrives(start_receiver):
    server, _ = start_receiver()
    fleet, now = Fleet([server]), weights(0)
    sync = WeightSync(Export(layout_of(now), lambda: iter(now.items())), fleet, SETTINGS)
    for version in (1, 2, 3):
        now = weights(version)
        publish(sync, fleet, version)
        assert fleet.serving() == [server], fleet.reasons()
        check_received(server, now)
    sync.close()


def test_a_receiver_that_dies_is_given_up_and_another_gets_everything(start_receiver):
    now = weights(4)
    first = DyingServer(*start_receiver(), nth=5)
    second, _ = start_receiver()
    fleet = Fleet([first])
    export = Export(layout_of(now), lambda: iter(now.items()))
    sync = WeightSync(export, fleet, SETTINGS)
    publish(sync, fleet, 1)
    assert fleet.serving() == [] and "bucket 5 of" in fleet.condemned[first]
    sync.close()
    fleet = Fleet([second])
    sync = WeightSync(export, fleet, SETTINGS)
    publish(sync, fleet, 1)
    assert fleet.serving() == [second], fleet.reasons()
    check_received(second, now)
    sync.close()

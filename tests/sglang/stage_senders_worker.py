"""Two pipeline stages send a tiny model to three receiving processes; then one of these stops in the second's turn.

    torchrun --nproc-per-node 2 tests/sglang/stage_senders_worker.py HF_DIR PORT:PID PORT:PID PORT:PID

with tests/ on PYTHONPATH; ports and process ids are the receivers'. Prints a line
for each update that went as it should; the first that does not raises.
"""

import asyncio
import hashlib
import os
import signal
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from tiny_models import megatron_args

from megatron_fipo import compat
from megatron_fipo.checkpoint.hf import export_hf_weights, hf_layout, load_hf_weights
from megatron_fipo.model.build import model_provider
from megatron_fipo.rollout.sglang.buckets import TensorSpec
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.server import Server, ServerAddress
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

VOCAB, BUCKET = 93, 40_000


class Receiver(Server):
    """Given ``stops_at``, it is stopped right before this rank sends it its bucket of this number."""

    stops_at = 0

    def __init__(self, port: str, pid: str):
        super().__init__(f"receiver {pid}", ServerAddress(f"http://127.0.0.1:{port}", "", ""))
        self._pid = int(pid)

    async def post(self, path, body=None, deadline_s=60.0, admin=False):
        if path == "/update_weights_from_distributed":
            self.stops_at -= 1
            if self.stops_at == 0:
                os.kill(self._pid, signal.SIGSTOP)
        return await super().post(path, body, deadline_s, admin)


def publish(sync: WeightSync, fleet: Fleet, chunks, version: int, expected: list[int]) -> None:
    """An update of changed weights, after which exactly the expected servers hold all of them."""
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(0.1 * version)
    fleet.begin_update(version)
    sync.publish(version)
    whole = {name: tensor.clone().view(-1).view(torch.uint8) for name, tensor in export_hf_weights(chunks, VOCAB)}
    wanted = {name: hashlib.sha256(raw.numpy()).hexdigest() for name, raw in whole.items()}
    if dist.get_rank() == 0:
        assert [fleet.servers.index(server) for server in fleet.serving()] == expected, fleet.reasons()
        for server in fleet.serving():
            assert asyncio.run(server.get("/sums")) == wanted
        print(f"update {version}: {expected}", flush=True)


def main() -> None:
    compat.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    args = megatron_args(sys.argv[1], "--pipeline-model-parallel-size", "2")
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = [model_provider(args)(stage == 0, stage == 1)]
    load_hf_weights(chunks, sys.argv[1])
    fleet = Fleet([Receiver(*where.split(":")) for where in sys.argv[2:]])
    settings = SyncSettings(bucket_bytes=BUCKET, deadline_s=10.0)
    layout = [TensorSpec(t.name, t.dtype, t.shape) for t in hf_layout(chunks, VOCAB, own_stage=True)]
    export = Export(layout, lambda: export_hf_weights(chunks, VOCAB, own_stage=True))
    sync = WeightSync(export, fleet, settings, stage)

    publish(sync, fleet, chunks, 1, [0, 1, 2])
    publish(sync, fleet, chunks, 2, [0, 1, 2])
    victim = fleet.servers[1]
    victim.stops_at = 2 if stage == 1 else 0
    publish(sync, fleet, chunks, 3, [0, 2])
    assert "bucket 2 of" in fleet.condemned[victim], fleet.reasons()
    publish(sync, fleet, chunks, 4, [0, 2])
    sync.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

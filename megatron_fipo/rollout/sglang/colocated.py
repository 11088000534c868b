"""Weights to servers that share the trainer's devices: handles of memory instead of a broadcast.

Each rank of a server has a trainer rank on its device. That one fills buckets from the export, in which all ranks take
part, and hands over each as CUDA memory that the server's process opens (on a CPU: shared memory); the first of a
server's trainer ranks collects the handles and makes the calls. Between `sleep` and `wake` the servers have given back
their memory.
"""

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.rollout.sglang.buckets import Bucket, fill_buckets, make_buffers, plan_buckets
from megatron_fipo.rollout.sglang.calls import Answer, Calls, fault
from megatron_fipo.rollout.sglang.export import Export, WeightStream
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums
from megatron_fipo.rollout.sglang.server import Server
from megatron_fipo.rollout.sglang.update_group import trainer_device
from megatron_fipo.rollout.sglang.update_session import SyncSettings, UpdateSession


class ColocatedSync:
    """Publishes weights to the servers on this node's devices."""

    def __init__(
        self,
        export: Export,
        fleet: Fleet,
        settings: SyncSettings,
        server: Server | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            export: of the whole model's weights; collective over all ranks.
            server: the one on this rank's device.
            group: the trainer ranks on that server's devices, in the order of its ranks; None for this one alone.
        """
        self._fleet, self._settings = fleet, settings
        self._server, self._group = server, group
        self._leads = server is not None and (group is None or group.rank() == 0)
        self._calls = Calls(fleet)
        self._stream = export.to_take_part if server is None else export.to_send
        self._buckets = plan_buckets(export.layout, settings.bucket_bytes)
        self._names = [spec.name for spec in export.layout]
        self._session = UpdateSession(self._names, fleet, self._calls, settings)
        self._asleep = False

    def publish(self, version: int) -> None:
        """Give the weights to the servers of all ranks; collective. Admits each on its leading rank, or condemns it."""
        stream = self._stream()
        if self._server is not None:
            size = 1 if self._group is None else self._group.size()
            sums = Checksums(self._names, [size], self._settings.kv_heads) if self._settings.check else None
            if self._agree(self._leads and self._open(self._server, size)):
                sent = self._transfer(self._server, stream, str(version), sums)
                if sent and self._leads:
                    self._session.finish([self._server], str(version), sums)
        for _ in stream:  # to its end on every rank, whatever happened: it is a collective
            pass

    def close(self) -> None:
        """Stop making calls."""
        self._calls.close()

    def _open(self, server: Server, size: int) -> bool:
        if server in self._fleet.condemned:
            return False
        if not self._session.is_current([server]) and server not in self._fleet.condemned:
            sizes = self._session.check_models([server])
            if sizes and sizes != [size]:
                self._calls.condemn(server, "the check of its model", f"{sizes[0]} ranks on {size} trainer ranks")
        return server not in self._fleet.condemned and self._session.begin([server])

    def _transfer(self, server: Server, stream: WeightStream, version: str, sums: Checksums | None) -> bool:
        """Whether the server has loaded every bucket. The next is filled while it loads one."""
        loading: tuple[Future[Answer] | None, Tensor] | None = None  # its memory must stay until the answer
        # One buffer: what is handed over is a copy of it, whose memory CUDA keeps until the server has let go of it.
        buffers = make_buffers(self._buckets, self._settings.bucket_bytes, trainer_device())[:1]
        for number, (bucket, filled) in enumerate(fill_buckets(stream, self._buckets, buffers), start=1):
            data = filled.clone()
            if sums and self._leads:
                for name, tensor in bucket.tensors(data):
                    sums.add(name, tensor)
            if loading and not self._loaded(server, loading[0], number - 1):
                return False
            handles = self._gather(serialize(bucket, data))
            label = version if number == len(self._buckets) else None
            loading = self._hand_over(server, handles, label) if self._leads else None, data
        return loading is None or self._loaded(server, loading[0], len(self._buckets))

    def _hand_over(self, server: Server, handles: list[str], version: str | None) -> "Future[Answer]":
        body = {
            "serialized_named_tensors": handles,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": version,
        }
        path, deadline = "/update_weights_from_tensor", self._settings.deadline_s
        return self._calls.start(server.post(path, body, deadline, admin=True))

    def _loaded(self, server: Server, answer: "Future[Answer] | None", number: int) -> bool:
        """Wait for the answer to a bucket, on the rank that leads."""
        error = fault(answer) if answer else None
        if error:
            self._calls.condemn(server, f"bucket {number} of {len(self._buckets)}", error)
        return self._agree(error is None)

    def _gather(self, handle: str) -> list[str]:
        """Of all ranks of the server, on the one that leads."""
        if self._group is None:
            return [handle]
        handles: list[Any] = [None] * self._group.size()
        dist.gather_object(handle, handles if self._leads else None, group=self._group, group_dst=0)
        return handles

    def _agree(self, value: bool) -> bool:
        """The leading rank's value."""
        told = [value]
        if self._group is not None:
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]

    # --- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Let the servers give back their memory, weights included: from now on they need an update to generate."""
        self._fleet.withdraw()
        if torch.cuda.is_available():  # a server on a CPU has nothing to give back, and dies of being asked
            self._asleep = self._asked("/release_memory_occupation", self._release)

    def wake(self) -> None:
        """Let the servers take their memory again, once the trainer has given back what it caches on their GPUs."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            if self._group is not None:
                dist.barrier(self._group)
        if self._asleep:
            self._asked("/resume_memory_occupation", self._resume)
            self._asleep = False

    async def _release(self, server: Server) -> Answer:
        # Requests that nobody waits for any more may still run, and a server that is not idle must not be asked.
        await server.post("/pause_generation", {"mode": "abort"}, self._settings.deadline_s, admin=True)
        return await server.post("/release_memory_occupation", {}, self._settings.deadline_s, admin=True)

    async def _resume(self, server: Server) -> Answer:
        return await server.post("/resume_memory_occupation", {}, self._settings.deadline_s, admin=True)

    def _asked(self, step: str, call: Callable[[Server], Coroutine[Any, Any, Answer]]) -> bool:
        """Whether this rank leads and its server has done it."""
        if not self._leads or self._server is None or self._server in self._fleet.condemned:
            return False
        return bool(self._calls.each([self._server], step, call))


def serialize(bucket: Bucket, data: Tensor) -> str:
    """A bucket as /update_weights_from_tensor takes it: the handle of its memory, uint8 [nbytes], and its layout."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    if data.is_cuda:
        monkey_patch_torch_reductions()  # devices travel by their UUIDs: the server counts them in another way
        torch.cuda.current_stream().synchronize()
    else:  # file descriptors reach only this process's children
        torch.multiprocessing.set_sharing_strategy("file_system")
    offset, layout = 0, []
    for spec in bucket.specs:
        end = offset + spec.nbytes
        layout.append(FlattenedTensorMetadata(spec.name, torch.Size(spec.shape), spec.dtype, offset, end, spec.nbytes))
        offset = end
    return MultiprocessingSerializer.serialize({"flattened_tensor": data, "metadata": layout}, output_str=True)

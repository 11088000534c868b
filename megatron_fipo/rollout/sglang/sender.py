"""A sender's side of a weight update: its tensors to all servers, broadcast in flattened buckets.

    join        once: a process group of this rank and all ranks of all servers
    transfer    per bucket a broadcast beside its HTTP call; the next bucket is filled meanwhile
    dissolve    after a bucket that broke, or for a group of other servers

Every HTTP call has a deadline. A server that refuses, dies or is overdue is condemned with its own words.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_fipo.rollout.sglang.buckets import Bucket, fill_buckets, make_buffers
from megatron_fipo.rollout.sglang.calls import Answer, Calls, failed, fault
from megatron_fipo.rollout.sglang.export import WeightStream
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums
from megatron_fipo.rollout.sglang.server import Server, ServerLost, ServerRefused
from megatron_fipo.rollout.sglang.update_group import UpdateGroup, address_towards, default_backend, trainer_device
from megatron_fipo.rollout.sglang.update_session import SyncSettings

log = logging.getLogger(__name__)

_JOIN = "/init_weights_update_group"
_RECEIVE_FAILED = "Failed to receive weights"  # SGLang's words for a broken broadcast, whoever broke it
_RELEASE_S = 8.0  # for a server to notice that a group's meeting point is gone, or its sender
_POLL_S = 0.05


@dataclass(frozen=True)
class _Message:
    """A bucket on the wire: the servers' answers to come, and this end of its broadcast."""

    name: str
    answers: "dict[Server, Future[Answer]]"
    broadcast: "Future[dist.Work]"

    def is_broken(self) -> bool:
        """Whether this end of the broadcast has failed."""
        if not self.broadcast.done():
            return False
        try:
            end = self.broadcast.result().get_future()
            if end.done():
                end.value()
        except RuntimeError:
            return True
        return False


class Sender:
    """Sends ``buckets`` to servers of ``fleet``, as one of the senders of an update."""

    def __init__(self, buckets: Sequence[Bucket], fleet: Fleet, calls: Calls, settings: SyncSettings) -> None:
        self._buckets, self._fleet, self._calls, self._settings = buckets, fleet, calls, settings
        self._device = trainer_device()
        self._group_names = (f"megatron-fipo-{secrets.token_hex(4)}-{n}" for n in itertools.count())
        self._group: UpdateGroup | None = None
        self._members: list[Server] = []
        self._sizes: list[int] = []  # of how many ranks each member is
        self._buffers: list[Tensor] = []
        self.sums: Checksums | None = None
        """Of the tensors of the last transfer, with `SyncSettings.check`."""

    # --- join --------------------------------------------------------------------------------------------------------

    def join(self, servers: Sequence[Server], sizes: Sequence[int]) -> bool:
        """Form a group with servers of so many ranks each; False if one was condemned instead."""
        group = UpdateGroup(
            name=next(self._group_names),
            world_size=1 + sum(sizes),
            backend=default_backend(),
            host=address_towards([server.address.url for server in servers]),
            join_timeout_s=self._settings.join_deadline_s,
            timeout_s=self._settings.deadline_s,
        )
        offsets = dict(zip(servers, itertools.accumulate(sizes, initial=1), strict=False))
        answers = self._calls.start_all(
            servers,
            lambda server: server.post(
                _JOIN,
                {
                    "master_address": group.host,
                    "master_port": group.port,
                    "rank_offset": offsets[server],
                    "world_size": group.world_size,
                    "group_name": group.name,
                    "backend": group.backend,
                },
                self._settings.join_deadline_s + _RELEASE_S,
                admin=True,
            ),
        )
        if self._meet(group, answers):
            self._group, self._members, self._sizes = group, [*servers], [*sizes]
            return True
        group.close()
        return False

    def _meet(self, group: UpdateGroup, answers: "dict[Server, Future[Answer]]") -> bool:
        """Open the group once everybody is there; otherwise condemn who is to blame."""
        pending, end = answers.values(), time.monotonic() + self._settings.join_deadline_s
        broken: Exception | str = f"not all servers joined within {self._settings.join_deadline_s:g} s"

        def all_there() -> bool:  # with NCCL they do not wait, but answer
            return group.everyone_waits() or all(answer.done() for answer in pending)

        while not any(map(failed, pending)) and not all_there() and time.monotonic() < end:
            time.sleep(0.02)
        if not any(map(failed, pending)) and all_there():
            try:
                group.open()
                return len(self._calls.collect(answers, _JOIN)) == len(answers)
            except RuntimeError as error:
                broken = error
        refused = [server for server, answer in answers.items() if failed(answer)]
        group.close()  # whoever waits in it now fails and answers; a server that is stuck elsewhere does not
        lost = [server for server, answer in answers.items() if isinstance(fault(answer), ServerLost)]
        for server in refused + lost or answers:
            self._calls.condemn(server, _JOIN, fault(answers[server]) or broken)
        return False

    def dissolve(self) -> None:
        """Leave the group and let those members forget it that can."""
        if self._group is None:
            return
        self._group.close()
        body = {"group_name": self._group.name}
        answers = self._calls.start_all(
            [server for server in self._members if server not in self._fleet.condemned],
            lambda server: server.post("/destroy_weights_update_group", body, _RELEASE_S, admin=True),
        )
        for server, answer in answers.items():  # a refusal says that it has no such group
            if isinstance(lost := fault(answer), ServerLost):
                self._calls.condemn(server, "/destroy_weights_update_group", lost)
        self._group, self._members = None, []

    # --- transfer ----------------------------------------------------------------------------------------------------

    def transfer(self, stream: WeightStream, version: str | None) -> bool:
        """Whether every server has loaded every bucket; if not, some are condemned and the group is dissolved.

        ``version`` goes with the last bucket: the label of the weights that are whole with it.
        """
        names = [spec.name for bucket in self._buckets for spec in bucket.specs]
        self.sums = Checksums(names, self._sizes, self._settings.kv_heads) if self._settings.check else None
        capacity = self._settings.bucket_bytes
        buffers = self._buffers or make_buffers(self._buckets, capacity, self._device)
        if self._device.type == "cpu":  # new pages cost about as much as the wire; CUDA's allocator keeps its own
            self._buffers = buffers
        on_wire: _Message | None = None
        for number, (bucket, data) in enumerate(fill_buckets(stream, self._buckets, buffers), start=1):
            if on_wire and not self._arrived(on_wire):
                return False
            on_wire = self._send(bucket, data, number, version if number == len(self._buckets) else None)
            if self.sums:
                for name, tensor in bucket.tensors(data):
                    self.sums.add(name, tensor)
        return on_wire is None or self._arrived(on_wire)

    def _send(self, bucket: Bucket, data: Tensor, number: int, version: str | None) -> _Message:
        assert self._group is not None
        body = bucket.description() | {
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,  # once at the end: one that is refused would fail the update
            "weight_version": version,
        }
        # The broadcast ends before its calls do: who is only a victim of it still has the time to say so.
        path, deadline = "/update_weights_from_distributed", self._settings.deadline_s + _RELEASE_S
        answers = self._calls.start_all(self._members, lambda server: server.post(path, body, deadline, admin=True))
        return _Message(f"bucket {number} of {len(self._buckets)}", answers, self._group.broadcast(data))

    def _arrived(self, message: _Message) -> bool:
        """Wait until a bucket is loaded everywhere. If it breaks, condemn who broke it and leave the group."""
        assert self._group is not None
        answers = message.answers.values()
        waiting = set(answers)
        while waiting and not any(map(failed, answers)) and not message.is_broken():
            waiting = wait(answers, timeout=_POLL_S, return_when=FIRST_EXCEPTION).not_done
        if not waiting and not any(map(failed, answers)):
            message.broadcast.result().wait()
            return True
        # First let everyone go who hangs in this broadcast: kill who is silent, then close this end. Whoever still
        # waits for it answers that the broadcast failed.
        for server, answer in message.answers.items():
            if failed(answer) and isinstance(answer.exception(), ServerLost):
                server.kill()
        self._group.abort()
        try:
            message.broadcast.result(_RELEASE_S).wait()
        except (RuntimeError, TimeoutError) as broken:
            log.warning("%s: %r", message.name, broken)
        self._group.close()
        faults = {server: error for server, answer in message.answers.items() if (error := fault(answer))}
        victims = {s for s, e in faults.items() if isinstance(e, ServerRefused) and _RECEIVE_FAILED in e.text}
        for server in (faults.keys() - victims) or victims:
            self._calls.condemn(server, message.name, faults[server])
        self.dissolve()
        return False

"""Rank 0's side of a weight update: one broadcast in flattened buckets, inside a session that all servers hold.

    open        once: a process group of this rank and all ranks of all servers, after comparing their models' names;
                then pause generation and open SGLang's update session
    transfer    per bucket a broadcast beside its HTTP call; the next bucket is filled meanwhile
    finish      close the session, flush the cache, check version (and checksums), let generation go on, admit

Every HTTP call has a deadline. A server that refuses, dies or is overdue is condemned with its own words. If that
happens before the last bucket is through, the group is dissolved, and the others get everything again, from the first
bucket on, in a new one. Only a server that finished is admitted, so a half-updated one never generates.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.rollout.sglang.buckets import Bucket, fill_buckets, make_buffers
from megatron_fipo.rollout.sglang.calls import Answer, Calls, failed, fault
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums
from megatron_fipo.rollout.sglang.server import Server, ServerLost, ServerRefused
from megatron_fipo.rollout.sglang.update_group import UpdateGroup, address_towards, default_backend
from megatron_fipo.rollout.sglang.update_session import SyncSettings, UpdateSession, condemn

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
    broadcast: dist.Work

    def is_broken(self) -> bool:
        """Whether this end of the broadcast has failed."""
        end = self.broadcast.get_future()
        if not end.done():
            return False
        try:
            end.value()
        except RuntimeError:
            return True
        return False


class Sender:
    """Sends ``buckets`` from ``device`` to the healthy servers of ``fleet``."""

    def __init__(self, buckets: Sequence[Bucket], device: torch.device, fleet: Fleet, settings: SyncSettings) -> None:
        self._buckets, self._device, self._fleet, self._settings = buckets, device, fleet, settings
        self._session = UpdateSession([spec.name for bucket in buckets for spec in bucket.specs], settings)
        self._group_names = (f"megatron-fipo-{secrets.token_hex(4)}-{n}" for n in itertools.count())
        self._calls = Calls()
        self._group: UpdateGroup | None = None
        self._versions: dict[Server, str | None] = {}  # of the group's members, in its order: what each must report
        self._sizes: list[int] = []  # and of how many ranks it is
        self._buffers: list[Tensor] = []
        self._sums: Checksums | None = None

    def close(self) -> None:
        self._dissolve()
        self._calls.close()

    # --- open --------------------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """A group and a session with every healthy server; False if no server is left."""
        while servers := self._fleet.healthy():
            if not self._is_group_of(servers):
                self._dissolve()
                if not self._join(servers):
                    continue
            if len(self._each(servers, "the begin of the update", self._session.begin)) == len(servers):
                return True
            self._dissolve()
        return False

    def _is_group_of(self, servers: Sequence[Server]) -> bool:
        """Whether the group is that of these servers. One that was restarted since reports another version."""
        if self._group is None or list(self._versions) != list(servers):
            return False
        infos = self._each(servers, "/model_info", lambda server: server.get("/model_info", self._settings.deadline_s))
        return infos.keys() == self._versions.keys() and all(
            info.get("weight_version") == self._versions[server] for server, info in infos.items()
        )

    def _join(self, servers: Sequence[Server]) -> bool:
        """Form the group; False if a server was condemned instead."""
        infos = self._each(servers, "the check of its model", self._session.check_model)
        if len(infos) < len(servers):
            return False
        ranks = [int(infos[server]["tp_size"]) for server in servers]
        group = UpdateGroup(
            name=next(self._group_names),
            world_size=1 + sum(ranks),
            backend=default_backend(),
            host=address_towards([server.address.url for server in servers]),
            join_timeout_s=self._settings.join_deadline_s,
            timeout_s=self._settings.deadline_s,
        )
        offsets = dict(zip(servers, itertools.accumulate(ranks, initial=1), strict=False))
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
            self._group, self._versions, self._sizes = group, dict.fromkeys(servers), ranks
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
                return len(self._collect(answers, _JOIN)) == len(answers)
            except RuntimeError as error:
                broken = error
        refused = [server for server, answer in answers.items() if failed(answer)]
        group.close()  # whoever waits in it now fails and answers; a server that is stuck elsewhere does not
        lost = [server for server, answer in answers.items() if isinstance(fault(answer), ServerLost)]
        for server in refused + lost or answers:
            self._condemn(server, _JOIN, fault(answers[server]) or broken)
        return False

    def _dissolve(self) -> None:
        """Leave the group and let those members forget it that can."""
        if self._group is None:
            return
        self._group.close()
        body = {"group_name": self._group.name}
        answers = self._calls.start_all(
            self._not_condemned(self._versions),
            lambda server: server.post("/destroy_weights_update_group", body, _RELEASE_S, admin=True),
        )
        for server, answer in answers.items():  # a refusal says that it has no such group
            if isinstance(lost := fault(answer), ServerLost):
                self._condemn(server, "/destroy_weights_update_group", lost)
        self._group, self._versions = None, {}

    # --- transfer ----------------------------------------------------------------------------------------------------

    def transfer(self, stream: Iterator[tuple[str, Tensor]], version: str) -> bool:
        """Whether every server has loaded every bucket; if not, some are condemned and the group is dissolved."""
        self._sums = self._session.checksums(self._sizes)
        capacity = self._settings.bucket_bytes
        buffers = self._buffers or make_buffers(self._buckets, capacity, self._device)
        if self._device.type == "cpu":  # new pages cost about as much as the wire; CUDA's allocator keeps its own
            self._buffers = buffers
        on_wire: _Message | None = None
        for number, (bucket, data) in enumerate(fill_buckets(stream, self._buckets, buffers), start=1):
            if on_wire and not self._arrived(on_wire):
                return False
            on_wire = self._send(bucket, data, number, version if number == len(self._buckets) else None)
            if self._sums:
                for name, tensor in bucket.tensors(data):
                    self._sums.add(name, tensor)
            if bucket.nbytes > capacity:  # a tensor of the export itself, which lasts only until the next
                if not self._arrived(on_wire):
                    return False
                on_wire = None
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
        answers = self._calls.start_all(self._versions, lambda server: server.post(path, body, deadline, admin=True))
        return _Message(f"bucket {number} of {len(self._buckets)}", answers, self._group.broadcast(data))

    def _arrived(self, message: _Message) -> bool:
        """Wait until a bucket is loaded everywhere. If it breaks, condemn who broke it."""
        assert self._group is not None
        answers = message.answers.values()
        waiting = set(answers)
        while waiting and not any(map(failed, answers)) and not message.is_broken():
            waiting = wait(answers, timeout=_POLL_S, return_when=FIRST_EXCEPTION).not_done
        if not waiting and not any(map(failed, answers)):
            message.broadcast.wait()
            return True
        # First let everyone go who hangs in this broadcast: kill who is silent, then close this end. Whoever still
        # waits for it answers that the broadcast failed.
        for server, answer in message.answers.items():
            if failed(answer) and isinstance(answer.exception(), ServerLost):
                server.kill()
        self._group.abort()
        try:
            message.broadcast.wait()
        except RuntimeError as broken:
            log.warning("%s: %s", message.name, broken)
        self._group.close()
        faults = {server: error for server, answer in message.answers.items() if (error := fault(answer))}
        victims = {s for s, e in faults.items() if isinstance(e, ServerRefused) and _RECEIVE_FAILED in e.text}
        for server in (faults.keys() - victims) or victims:
            self._condemn(server, message.name, faults[server])
        self._dissolve()
        return False

    # --- finish ------------------------------------------------------------------------------------------------------

    def finish(self, version: str) -> None:
        """Admit each server whose update ends well."""
        members = list(self._versions)
        finished = self._each(
            members, "the end of the update", lambda server: self._session.end(server, version, self._sums)
        )
        for server in finished:
            self._versions[server] = version
            self._fleet.admit(server)
        if len(finished) < len(members):
            self._dissolve()

    # --- calls -------------------------------------------------------------------------------------------------------

    def _each(
        self, servers: Sequence[Server], step: str, call: Callable[[Server], Coroutine[Any, Any, Answer]]
    ) -> dict[Server, Answer]:
        """Answers of the servers that gave one, in order; the others are condemned."""
        return self._collect(self._calls.start_all(servers, call), step)

    def _collect(self, answers: "dict[Server, Future[Answer]]", step: str) -> dict[Server, Answer]:
        for server, answer in answers.items():
            if error := fault(answer):
                self._condemn(server, step, error)
        return {server: answer.result() for server, answer in answers.items() if not failed(answer)}

    def _condemn(self, server: Server, step: str, error: Exception | str) -> None:
        condemn(self._fleet, server, step, error)

    def _not_condemned(self, servers: "Sequence[Server] | dict[Server, Any]") -> list[Server]:
        return [server for server in servers if server not in self._fleet.condemned]

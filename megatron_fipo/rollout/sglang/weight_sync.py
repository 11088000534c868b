"""The trainer's weights to the servers, as all trainer ranks see it.

Each pipeline stage has a sender, the first of its ranks, with an update group of its own: a tensor is gathered from the
tensor-parallel and expert ranks of its stage and goes to the servers from there. The stages send in turn (a server
takes one message at a time), between one begin and one end, which are those of the first stage's sender.

If a server fails before the last bucket is through, all groups are dissolved, and the other servers get everything
again, from the first bucket on, in new ones. Only a server that finished is admitted, so a half-updated one never
generates.
"""

from collections.abc import Callable
from datetime import timedelta
from operator import attrgetter
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fipo.rollout.sglang.buckets import plan_buckets
from megatron_fipo.rollout.sglang.calls import Calls
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums
from megatron_fipo.rollout.sglang.sender import Sender
from megatron_fipo.rollout.sglang.server import Server
from megatron_fipo.rollout.sglang.update_session import SyncSettings, UpdateSession

T = TypeVar("T")

_TURN = timedelta(hours=2)  # far beyond what the senders' own deadlines allow a turn to take


class WeightSync:
    """Publishes weights to the healthy servers of a fleet."""

    def __init__(self, export: Export, fleet: Fleet, settings: SyncSettings, stage: int = 0) -> None:
        """Collective over all ranks.

        Args:
            export: of the weights of this rank's pipeline stage; collective over the ranks of the stage, and whole on
                each.
            stage: this rank's pipeline stage.
        """
        self._export, self._fleet, self._settings, self._stage = export, fleet, settings, stage
        self._calls = Calls(fleet)
        self._talk: Any = None  # a process group
        self._leaders = [0]
        """The rank that sends, for each stage."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._talk = dist.new_group(backend="gloo", timeout=_TURN)
            stages: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(stages, stage, group=self._talk)
            self._leaders = [stages.index(i) for i in range(max(stages) + 1)]
        self._stages = range(len(self._leaders))
        self._sender: Sender | None = None  # of the stage, on the rank that sends for it
        self._session: UpdateSession | None = None  # on the first stage's sender
        names: list[str] = []
        for i in self._stages:
            names += self._told_by(i, [spec.name for spec in export.layout], list)
        if self._leads(stage):
            buckets = plan_buckets(export.layout, settings.bucket_bytes)
            self._sender = Sender(buckets, fleet, self._calls, settings)
        if self._leads(0):
            self._session = UpdateSession(names, fleet, self._calls, settings)

    def publish(self, version: int) -> None:
        """Give the weights to all healthy servers and admit those that hold all of them; collective over all ranks.

        Raises nothing for a server's fault: that server is condemned with the reason, and the others are updated.
        """
        while servers := self._open():
            if all(self._send(stage, str(version)) for stage in self._stages):
                self._finish(servers, str(version))
                return

    def sleep(self) -> None:
        """Nothing to do: the servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Dissolve the groups with the servers."""
        if self._sender:
            self._sender.dissolve()
        self._calls.close()

    def _open(self) -> list[Server]:
        """Groups and a session with all healthy servers, which it returns; nothing if none is left."""
        while servers := self._fleet.healthy():
            if not self._told_by(0, self._session, UpdateSession.is_current, servers):
                for stage in self._stages:
                    self._told_by(stage, self._sender, Sender.dissolve)
                if servers != self._fleet.healthy() or not self._join(servers):
                    continue
            if self._told_by(0, self._session, UpdateSession.begin, servers):
                return servers
        return []

    def _join(self, servers: list[Server]) -> bool:
        """False if a server was condemned."""
        sizes = self._told_by(0, self._session, UpdateSession.check_models, servers)
        return len(sizes) == len(servers) and all(
            self._told_by(stage, self._sender, Sender.join, servers, sizes) for stage in self._stages
        )

    def _send(self, stage: int, version: str) -> bool:
        """A stage's turn; False if a server was condemned."""
        sent = False
        if stage == self._stage:
            stream = self._export.to_send() if self._sender else self._export.to_take_part()
            if self._sender:
                sent = self._sender.transfer(stream, version if stage == self._stages[-1] else None)
            for _ in stream:  # to its end on every rank, whatever happened: it is a collective
                pass
        return self._told_by(stage, sent, bool)

    def _finish(self, servers: list[Server], version: str) -> None:
        sums = None
        if self._settings.check:
            sums = Checksums.joined(self._told_by(stage, self._sender, attrgetter("sums")) for stage in self._stages)
        self._told_by(0, self._session, UpdateSession.finish, servers, version, sums)

    def _leads(self, stage: int) -> bool:
        return self._talk is None or dist.get_rank() == self._leaders[stage]

    def _told_by(self, stage: int, part: Any, say: Callable[..., T], *args: Any) -> T:
        """``say(part, ...)`` of a stage's sender, which alone has that part, on every rank; whom it has condemned by
        then is condemned everywhere."""
        message: list[Any] = [None]
        if self._leads(stage):
            said = say(part, *args)
            condemned = {self._fleet.servers.index(server): why for server, why in self._fleet.condemned.items()}
            message = [(said, condemned)]
        if self._talk is not None:
            dist.broadcast_object_list(message, src=self._leaders[stage], group=self._talk)
        said, condemned = message[0]
        for i, reason in condemned.items():
            self._fleet.condemn(self._fleet.servers[i], reason)
        return said

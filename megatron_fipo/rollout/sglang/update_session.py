"""What is around every weight update, however the tensors travel: the calls before the first and after the last."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.rollout.sglang.calls import Answer, Calls
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums, name_mismatch
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerRefused
from megatron_fipo.rollout.sglang.shards import uncut

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncSettings:
    """``bucket_bytes``: size of a message, and of each of a sender's two buffers.

    ``pause``: what becomes of requests in flight. "abort" ends them with what they have, "retract" computes their keys
    and values again under the new weights, "in_place" lets them go on with the old ones.
    ``check``: compare checksums of all parameters after each update; servers of several ranks need ``kv_heads``, the
    number of the model's key-value heads, for it.
    ``deadline_s``: of every call and its collective; ``join_deadline_s``: for forming a group.
    ``fault_of``: why a server with this /server_info cannot take these weights; None if it can.
    """

    bucket_bytes: int = 512 * 2**20
    pause: str = "retract"
    check: bool = False
    kv_heads: int = 1
    deadline_s: float = 120.0
    join_deadline_s: float = 60.0
    fault_of: Callable[[Answer], str | None] = lambda info: None


class UpdateSession:
    """Opens and closes updates of servers with all the tensors of ``names``; who fails in one is condemned."""

    def __init__(self, names: Sequence[str], fleet: Fleet, calls: Calls, settings: SyncSettings) -> None:
        self._names, self._fleet, self._calls, self._settings = names, fleet, calls, settings
        self._updated: list[Server] = []  # by the last update,
        self._version = ""  # to this version

    def is_current(self, servers: Sequence[Server]) -> bool:
        """Whether these servers were last updated together. One that was restarted since reports another version."""
        if self._updated != list(servers):
            return False
        infos = self._calls.each(
            servers, "/model_info", lambda server: server.get("/model_info", self._settings.deadline_s)
        )
        return len(infos) == len(servers) and all(i.get("weight_version") == self._version for i in infos.values())

    def check_models(self, servers: Sequence[Server]) -> list[int]:
        """The number of ranks of each server; shorter if the model of one is not the trainer's."""
        infos = self._calls.each(servers, "the check of its model", self._check_model)
        return [int(info["tp_size"]) for info in infos.values()]

    def begin(self, servers: Sequence[Server]) -> bool:
        """Pause generation and open a session everywhere; False if a server was condemned instead."""
        self._updated = []
        return len(self._calls.each(servers, "the begin of the update", self._begin)) == len(servers)

    def finish(self, servers: Sequence[Server], version: str, sums: Checksums | None) -> None:
        """Admit each server whose update ends well."""
        finished = self._calls.each(servers, "the end of the update", lambda server: self._end(server, version, sums))
        # Who was lost on the way is still a member of the groups: the next update must form new ones.
        self._updated, self._version = list(finished) if len(finished) == len(servers) else [], version
        for server in finished:
            self._fleet.admit(server)

    async def _check_model(self, server: Server) -> Answer:
        """Its /server_info, once its model is known to have a place for every tensor, and a tensor for every place."""
        info = await server.get("/server_info", self._settings.deadline_s)
        if info.get("pp_size", 1) != 1:
            raise MalformedAnswer("servers with pipeline stages cannot be updated; use tensor parallelism")
        if wrong := self._settings.fault_of(info):
            raise MalformedAnswer(wrong)
        if self._settings.check and info["tp_size"] != 1 and (why := uncut(self._names, info)):
            raise MalformedAnswer(f"--check-weights {why}")
        report = await self._checksums(server)
        if wrong := name_mismatch(self._names, report["ranks"][0]["checksums"]):
            raise MalformedAnswer(wrong)
        return info

    async def _begin(self, server: Server) -> Answer:
        """The session of a trainer that died in it is closed first."""
        deadline = self._settings.deadline_s
        await server.post("/pause_generation", {"mode": self._settings.pause}, deadline, admin=True)
        try:
            return await server.post("/begin_weight_update", {}, deadline, admin=True)
        except ServerRefused as error:
            if "already open" not in error.text:
                raise
        await server.post("/end_weight_update", {}, deadline, admin=True)
        return await server.post("/begin_weight_update", {}, deadline, admin=True)

    async def _end(self, server: Server, version: str, sums: Checksums | None) -> Answer:
        """Close the session, check what the server holds, and let it generate."""
        deadline = self._settings.deadline_s
        await server.post("/end_weight_update", {}, deadline, admin=True)
        try:
            await server.post("/flush_cache", {}, deadline, admin=True)
        except ServerRefused as error:  # requests that go on with their old keys and values hold the cache
            if self._settings.pause != "in_place":
                raise
            log.warning("%s keeps its cache: %s", server, error)
        info = await server.get("/model_info", deadline)
        if info.get("weight_version") != version:
            raise MalformedAnswer(f"it reports version {info.get('weight_version')!r} after the update to {version!r}")
        if sums:
            report = await self._checksums(server)
            if wrong := sums.mismatch([rank["checksums"] for rank in report["ranks"]]):
                raise MalformedAnswer(f"--check-weights: {wrong}")
        return await server.post("/continue_generation", {}, deadline, admin=True)

    async def _checksums(self, server: Server) -> Answer:
        return await server.post("/weights_checker", {"action": "checksum"}, self._settings.deadline_s, admin=True)

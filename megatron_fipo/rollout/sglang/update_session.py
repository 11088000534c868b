"""What is around every weight update, however the tensors travel: the calls to one server before and after them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.rollout.sglang.calls import Answer
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import Checksums, name_mismatch
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerLost, ServerRefused
from megatron_fipo.rollout.sglang.shards import uncut

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncSettings:
    """``bucket_bytes``: size of a message, and of each of the sender's two buffers.

    ``pause``: what becomes of requests in flight. "abort" ends them with what they have, "retract" computes their keys
    and values again under the new weights, "in_place" lets them go on with the old ones.
    ``check``: compare checksums of all parameters after each update; servers of several ranks need ``kv_heads``, the
    number of the model's key-value heads, for it.
    ``deadline_s``: of every call and its collective; ``join_deadline_s``: for forming the group.
    """

    bucket_bytes: int = 512 * 2**20
    pause: str = "retract"
    check: bool = False
    kv_heads: int = 1
    deadline_s: float = 120.0
    join_deadline_s: float = 60.0


class UpdateSession:
    """For tensors of the names ``tensor_names``. Every method raises ServerLost, ServerRefused, MalformedAnswer."""

    def __init__(self, tensor_names: Sequence[str], settings: SyncSettings) -> None:
        self._tensor_names, self._settings = tensor_names, settings

    def checksums(self, sizes: Sequence[int]) -> Checksums | None:
        """To be given the tensors of an update to servers of so many ranks, if they are to be checked."""
        return Checksums(self._tensor_names, sizes, self._settings.kv_heads) if self._settings.check else None

    async def check_model(self, server: Server) -> Answer:
        """Its /server_info, once its model is known to have a place for every tensor, and a tensor for every place."""
        info = await server.get("/server_info", self._settings.deadline_s)
        if info.get("pp_size", 1) != 1:
            raise MalformedAnswer("servers with pipeline stages cannot be updated; use tensor parallelism")
        if self._settings.check and info["tp_size"] != 1 and (why := uncut(self._tensor_names, info)):
            raise MalformedAnswer(f"--check-weights {why}")
        report = await self._checksums(server)
        if wrong := name_mismatch(self._tensor_names, report["ranks"][0]["checksums"]):
            raise MalformedAnswer(wrong)
        return info

    async def begin(self, server: Server) -> Answer:
        """Pause generation and open a session, first closing one that a trainer left open as it died."""
        deadline = self._settings.deadline_s
        await server.post("/pause_generation", {"mode": self._settings.pause}, deadline, admin=True)
        try:
            return await server.post("/begin_weight_update", {}, deadline, admin=True)
        except ServerRefused as error:
            if "already open" not in error.text:
                raise
        await server.post("/end_weight_update", {}, deadline, admin=True)
        return await server.post("/begin_weight_update", {}, deadline, admin=True)

    async def end(self, server: Server, version: str, sums: Checksums | None) -> Answer:
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


def condemn(fleet: Fleet, server: Server, step: str, error: Exception | str) -> None:
    """With the server's own words; one that does not answer is killed, where this process can."""
    if isinstance(error, ServerLost):
        server.kill()
    tail = server.log_tail()
    fleet.condemn(server, f"{step}: {error}" + (f"\nthe end of its log:\n{tail}" if tail else ""))

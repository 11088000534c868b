"""The rollout engine over SGLang servers, as every rank of the trainer calls it."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.engine import Completion, ProgressCallback, SamplingParams
from megatron_fipo.rollout.sglang.client import Client, RolloutFailed
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerLost, ServerRefused

_HEARTBEAT_S = 1.0
_ANSWER_S = 20.0


class WeightSync(Protocol):
    """Publishes the trainer's weights to the fleet's healthy servers."""

    def publish(self, version: int) -> None:
        """Collective over all ranks. Admits each server that holds all the weights, on at least one rank; condemns the
        others."""
        ...

    def close(self) -> None:
        """Leave the servers alone from now on."""
        ...


class SGLangEngine:
    """A RolloutEngine on servers of their own weights.

    The leader of each data-parallel replica asks all servers for its own share of the prompts; its other ranks get the
    completions from it. All ranks call every method together.

    Seeds decide completions only on servers with --enable-deterministic-inference (see docs/engines.md).
    """

    def __init__(self, fleet: Fleet, client: Client, sync: WeightSync):
        self._fleet, self._client, self._sync = fleet, client, sync

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Return one completion for each (prompt, seed), in order; see RolloutEngine. The leader decides on giving up.

        Raises RolloutFailed, UserError.
        """
        if not prompts:
            return []
        if not _leads():
            while (message := _from_leader(None)) is None:
                given_up()
        else:
            message = self._generate(prompts, seeds, sampling, on_finished or (lambda n: None), given_up)
            _from_leader(message)
        if isinstance(message, Exception):
            raise message
        return message

    def update_weights(self, version: int) -> None:
        """Publish the trainer's weights; from here on only servers that hold them generate. Raises RolloutFailed."""
        self._agree()
        self._pardon_who_answers()
        self._fleet.begin_update(version)
        self._sync.publish(version)
        self._agree()
        if not self._fleet.serving():
            raise RolloutFailed(f"no server took the weights of step {version}: {self._fleet.reasons()}")

    def sleep(self) -> None:
        """Nothing to do: the servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Stop the servers that this process started."""
        self._sync.close()
        self._fleet.close()

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback,
        given_up: Callable[[], bool],
    ) -> list[Completion] | Exception:
        """Generate in a thread; here report progress, and tell the other ranks that it goes on, so that none of them
        waits longer than its process group allows."""
        events: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            completions = self._client.generate(prompts, seeds, sampling, events.put)
            batch = pool.submit(asyncio.run, _unless(stopped, completions))
            batch.add_done_callback(lambda _: events.put(None))
            heard = time.monotonic()
            while not batch.done() or not events.empty():
                with contextlib.suppress(queue.Empty):
                    on_finished(events.get(timeout=_HEARTBEAT_S) or 0)
                if time.monotonic() - heard > _HEARTBEAT_S:
                    _from_leader(None)
                    if given_up():
                        stopped.set()
                        break
                    heard = time.monotonic()
        error = batch.exception()
        if isinstance(error, RolloutFailed | UserError):
            return error
        return batch.result()

    def _agree(self) -> None:
        """Every rank learns whom any rank has condemned or admitted."""
        servers = self._fleet.servers
        condemned = {i: self._fleet.condemned[s] for i, s in enumerate(servers) if s in self._fleet.condemned}
        admitted = [servers.index(s) for s in self._fleet.serving()]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (condemned, admitted))
        for theirs, _ in everyone:
            for i, reason in theirs.items():
                self._fleet.condemn(servers[i], reason)
        for i in {i for _, theirs in everyone for i in theirs}:
            if servers[i] not in self._fleet.condemned:
                self._fleet.admit(servers[i])

    def _pardon_who_answers(self) -> None:
        """Condemned servers that answer again (continued, reachable again) take part in the coming update."""
        answering: list[Any] = [[]]
        if dist.get_rank() == 0:
            answering = [asyncio.run(_answering(self._fleet.servers, self._fleet.condemned))]
        dist.broadcast_object_list(answering, src=0, device=_device())
        for i in answering[0]:
            self._fleet.pardon(self._fleet.servers[i])


async def _unless(stopped: threading.Event, completions: Coroutine[Any, Any, list[Completion]]) -> list[Completion]:
    """The completions, or an empty list soon after ``stopped`` was set; closed connections make the servers abort."""
    task = asyncio.create_task(completions)
    while not (await asyncio.wait([task], timeout=_HEARTBEAT_S / 4))[0]:
        if stopped.is_set():
            task.cancel()
    return [] if task.cancelled() else task.result()


async def _answering(servers: Sequence[Server], condemned: Mapping[Server, str]) -> list[int]:
    """Numbers of the condemned servers whose scheduler, not only its HTTP front, answers."""

    async def answers(server: Server) -> bool:
        try:
            await server.get("/server_info", _ANSWER_S)
        except (ServerLost, ServerRefused, MalformedAnswer):
            return False
        return True

    asked = [i for i, server in enumerate(servers) if server in condemned]
    found = await asyncio.gather(*(answers(servers[i]) for i in asked))
    return [i for i, answer in zip(asked, found, strict=True) if answer]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _leads() -> bool:
    """Whether this rank talks to the servers for its data-parallel replica."""
    stage = parallel_state.get_pipeline_model_parallel_group()
    return stage.rank() == parallel_state.get_tensor_and_context_parallel_group().rank() == 0


def _from_leader(message: Any) -> Any:
    """The leader's ``message`` on every rank of its replica: along the pipeline, then inside each stage."""
    box = [message]
    for group in (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_and_context_parallel_group(),
    ):
        if group.size() > 1:
            dist.broadcast_object_list(box, group=group, group_src=0, device=_device())
    return box[0]

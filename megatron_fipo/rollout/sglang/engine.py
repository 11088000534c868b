"""The rollout engine over SGLang servers, as every rank of the trainer calls it."""

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
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

    def sleep(self) -> None:
        """Free what the servers hold of the trainer's devices."""
        ...

    def wake(self) -> None:
        """Undo it; an update follows."""
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

    def __init__(self, fleet: Fleet, client: Client, sync: WeightSync, replicas: Replicas):
        self._fleet, self._client, self._sync, self._replicas = fleet, client, sync, replicas
        self.in_step = (parallel_state.get_model_parallel_group(),)
        self._starting: set[Server] = set()
        self._counts: Counter[str] = Counter()  # of all replicas, since the start
        self._reported: Counter[str] = Counter()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        on_finished: ProgressCallback | None = None,
        given_up: Callable[[], bool] = lambda: False,
        starts: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Return one completion for each (prompt, seed), in order; see RolloutEngine. The leader decides on giving up.

        Nothing is told of ``starts``: a server that heeds seeds draws by a token's position, its prompt included.

        Raises RolloutFailed, UserError.
        """
        if not prompts:
            return []
        if not self._replicas.leads:
            while (message := self._from_leader(None)) is None:
                given_up()
        else:
            message = self._generate(prompts, seeds, sampling, on_finished or (lambda n: None), given_up)
            self._from_leader(message)
        if isinstance(message, Exception):
            raise message
        return message

    def update_weights(self, version: int) -> None:
        """Publish the trainer's weights; from here on only servers that hold them generate. Raises RolloutFailed."""
        self._agree()
        self._pardon_or_restart()
        self._fleet.begin_update(version)
        self._sync.publish(version)
        self._agree()
        if not self._fleet.serving():
            raise RolloutFailed(f"no server took the weights of step {version}: {self._fleet.reasons()}")

    def sleep(self) -> None:
        """Leave the trainer its devices, if they are shared; see RolloutEngine."""
        self._sync.sleep()

    def wake(self) -> None:
        """Servers that share them hold no weights until the next update."""
        self._sync.wake()

    def metrics(self) -> dict[str, float]:
        """What the replicas' answers cost and which servers were condemned between the last two weight updates, or
        longer ago if that has not been asked for yet."""
        new = {f"rollout/{name}": float(count - self._reported[name]) for name, count in self._counts.items()}
        self._reported = self._counts
        return new | {"rollout/servers_serving": len(self._fleet.serving())}

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
                    self._from_leader(None)
                    if given_up():
                        stopped.set()
                        break
                    heard = time.monotonic()
        error = batch.exception()
        if isinstance(error, RolloutFailed | UserError):
            return error
        return batch.result()

    def _from_leader(self, message: Any) -> Any:
        return self._replicas.from_leader(lambda: message)

    def _agree(self) -> None:
        """Every rank learns whom any rank has condemned or admitted, and how many answers failed."""
        servers = self._fleet.servers
        condemned = {i: self._fleet.condemned[s] for i, s in enumerate(servers) if s in self._fleet.condemned}
        admitted = [servers.index(s) for s in self._fleet.serving()]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (condemned, admitted, asdict(self._client.faults)))
        for theirs, _, _ in everyone:
            for i, reason in theirs.items():
                self._fleet.condemn(servers[i], reason)
        for i in {i for _, theirs, _ in everyone for i in theirs}:
            if servers[i] not in self._fleet.condemned:
                self._fleet.admit(servers[i])
        self._counts = Counter(servers_condemned=self._fleet.condemnations)
        for *_, faults in everyone:
            self._counts.update({f"answers_{name}": count for name, count in faults.items()})

    def _pardon_or_restart(self) -> None:
        """Condemned servers that answer again (continued, reachable again, restarted) take part in the coming update;
        the others are started again by whoever started them, to take part in a later one."""
        answering: list[Any] = [[]]
        if dist.get_rank() == 0:
            answering = [asyncio.run(_answering(self._fleet.servers, self._fleet.condemned))]
        dist.broadcast_object_list(answering, src=0, device=self._replicas.device)
        for i, server in enumerate(self._fleet.servers):
            if i in answering[0]:
                self._starting.discard(server)
                self._fleet.pardon(server)
            elif server in self._fleet.condemned and (server not in self._starting or not server.alive()):
                self._starting.add(server)
                server.restart()


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

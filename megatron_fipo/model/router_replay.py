"""The same experts for the same tokens in old_logp's forward pass and in the updates that are compared with it.

A router decides by a top-k, so a small step of the weights can send a token to other experts. Its log-prob then jumps,
and ratios and future-KL sums take the jump for a change of the policy. The passes that compute old_logp record each
router's choice, and every pass of the updates takes the recorded experts, with the weights that the router gives them
now: the gradient flows through the router as before.

A record belongs to a pack and is good for every update on it. Between the forward passes of an update Megatron's
schedule runs backward passes, whose recomputation must route as its forward pass did; that is why the routers keep
replaying until ``clear``. For a dense model, or without ``--moe-enable-routing-replay``, everything here does nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import get_model_config

from megatron_fipo.data.packing import RoutingRecord


class RoutingReplay:
    """Records and replays the routing of a model's chunks."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """`chunks`: this rank's model chunks, as the schedule passes them on."""
        config = get_model_config(chunks[0])
        self._dtype = torch.uint8 if (config.num_moe_experts or 0) <= 256 else torch.int16
        # A recomputed router takes its experts from a queue, in the order of the forward passes.
        self._recomputes = config.recompute_granularity == "full" or "moe" in (config.recompute_modules or ())
        self._numbers = {id(chunk): number for number, chunk in enumerate(chunks)}
        self._routers = [_routers(chunk) for chunk in chunks]

    @contextlib.contextmanager
    def recording(self, model: torch.nn.Module, record: RoutingRecord) -> Iterator[None]:
        """A forward pass of `model` (one of the chunks) under it adds the chosen experts to `record`."""
        number = self._numbers[id(model)]
        routers = self._routers[number]
        _set_action(routers, RouterReplayAction.RECORD)
        yield
        record.experts[number] = tuple(router.get_recorded_indices().to(self._dtype) for router in routers)
        _clear(routers)

    @contextlib.contextmanager
    def replaying(self, model: torch.nn.Module, record: RoutingRecord) -> Iterator[None]:
        """A forward pass of `model` under it takes the experts of `record`, as does its backward pass later on.

        Raises:
            KeyError: this chunk has not recorded the pack.
        """
        number = self._numbers[id(model)]
        routers = self._routers[number]
        for router, experts in zip(routers, record.experts[number], strict=True):
            if self._recomputes:
                router.set_target_indices(experts.long())
            else:
                router.target_topk_idx = experts.long()
        _set_action(routers, RouterReplayAction.REPLAY_FORWARD)
        yield
        _set_action(routers, RouterReplayAction.REPLAY_BACKWARD)

    def clear(self) -> None:
        """Let the routers choose again."""
        for routers in self._routers:
            _clear(routers)


def _routers(chunk: torch.nn.Module) -> list[RouterReplay]:
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    return [router.router_replay for router in routers if router.router_replay is not None]


def _set_action(routers: Sequence[RouterReplay], action: RouterReplayAction) -> None:
    for router in routers:
        router.set_router_replay_action(action)


def _clear(routers: Sequence[RouterReplay]) -> None:
    for router in routers:
        router.clear_indices()
        router.clear_router_replay_action()

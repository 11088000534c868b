"""This rank's place among the ranks, as rollout, planning and metrics see it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """This rank's place among the data-parallel replicas of the model, and the groups that join it to its peers.

    ``group`` joins the peers in the other replicas, ``context`` the context-parallel ranks of this one. ``pieces`` are
    the groups over which numbers add up that a rank knows of its own tokens alone: replicas and context-parallel
    ranks, then pipeline stages, of which only the last knows any. ``leads`` on one rank of each replica, which does
    what must be done once per replica; ``members`` are the groups through which its word reaches the others: along the
    pipeline, then inside each stage.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    context: dist.ProcessGroup
    pieces: tuple[dist.ProcessGroup, ...]
    members: tuple[dist.ProcessGroup, ...]
    device: torch.device
    leads: bool

    @classmethod
    def current(cls) -> "Replicas":
        """From Megatron's parallel state, after initialize_megatron."""
        group, context = parallel_state.get_data_parallel_group(), parallel_state.get_context_parallel_group()
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        shards = parallel_state.get_data_parallel_group(with_context_parallel=True)
        members = pipeline, parallel_state.get_tensor_and_context_parallel_group()
        leads = all(g.rank() == 0 for g in members)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(group.rank(), group.size(), group, context, (shards, pipeline), members, device, leads)

    def from_leader[T](self, make: Callable[[], T]) -> T:
        """What ``make`` returns on this replica's leader, on all of its ranks (pickled: it stays inside the job)."""
        box: list[Any] = [make() if self.leads else None]
        for group in self.members:
            if group.size() > 1:
                dist.broadcast_object_list(box, group=group, group_src=0, device=self.device)
        return box[0]

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the replicas what every rank of a replica knows; returns it on the CPU."""
        return _reduced(values.to(self.device), op, (self.group,))

    def all_reduce_pieces(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce what each rank knows of its own tokens alone; returns it on the CPU.

        Ranks that know of none, like all pipeline stages but the last, bring ``op``'s neutral element.
        """
        return _reduced(values.to(self.device), op, self.pieces)


def _reduced(values: Tensor, op: dist.ReduceOp.RedOpType, groups: Iterable[dist.ProcessGroup]) -> Tensor:
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(values, op=op, group=group)
    return values.cpu()

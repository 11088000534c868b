"""The data-parallel axis as rollout, planning and metrics see it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """This rank's place among the replicas of the model, and the group that joins its peers.

    ``leads`` on one rank of each replica, which does what must be done once per replica.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    device: torch.device
    leads: bool

    @classmethod
    def current(cls) -> "Replicas":
        """From Megatron's parallel state, after initialize_megatron."""
        group = parallel_state.get_data_parallel_group()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(group.rank(), group.size(), group, device, parallel_state.get_model_parallel_group().rank() == 0)

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor over the replicas; returns it on the CPU."""
        values = values.to(self.device)
        dist.all_reduce(values, op=op, group=self.group)
        return values.cpu()

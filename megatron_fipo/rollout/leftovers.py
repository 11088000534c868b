"""Groups that a step generated and did not need: the next step starts with them, also after a resume.

In a checkpoint's folder they are ``leftovers.safetensors``, the numbers of all of them, and one
``__RANK_leftovers.safetensors`` for each replica, named after the rank that wrote and will vouch for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from torch import Tensor

from megatron_fipo.data.samples import Sample
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.sample_files import load_samples, save_columns, save_samples

_TABLE = "leftovers.safetensors"


@dataclass(frozen=True, eq=False)
class Leftovers:
    """Groups with right and wrong answers beyond those that a step trained on, in the order of their prompts.

    visits  the groups' visit numbers
    table   fp64 [groups, group size, columns], the numbers of their samples (GeneratedSamples)
    held    this replica's groups, by visit
    """

    visits: tuple[int, ...]
    table: Tensor
    held: Mapping[int, Sequence[Sample]]

    @classmethod
    def none(cls, group_size: int, columns: int) -> "Leftovers":
        """No group."""
        return cls((), torch.zeros(0, group_size, columns, dtype=torch.float64), {})

    def first(self, count: int) -> "Leftovers":
        """The first ``count`` groups, or as many as there are."""
        visits = self.visits[:count]
        return Leftovers(
            visits, self.table[:count], {visit: self.held[visit] for visit in visits if visit in self.held}
        )

    def write(self, folder: Path, replicas: Replicas) -> None:
        """Write this rank's part, if it has one; not collective. Raises OSError."""
        if not replicas.leads:
            return
        samples = [sample for group in self.held.values() for sample in group]
        save_samples(folder / f"__{dist.get_rank()}_{_TABLE}", samples)
        if replicas.rank == 0:
            numbers = {"table": self.table.numpy(), "visits": np.array(self.visits, np.int64)}
            save_columns(folder / _TABLE, numbers)

    @classmethod
    def read(cls, folder: Path, replicas: Replicas) -> "Leftovers | None":
        """What a checkpoint holds, shared out in turn over however many replicas there are now; None: nothing."""
        if not (folder / _TABLE).is_file():
            return None
        numbers = load_file(folder / _TABLE)
        visits = tuple(numbers["visits"].tolist())
        groups: dict[int, list[Sample]] = {visit: [] for visit in visits[replicas.rank :: replicas.size]}
        for path in sorted(folder.glob(f"__*_{_TABLE}")):
            for sample in load_samples(path):
                if sample.group_id in groups:
                    groups[sample.group_id].append(sample)
        return cls(visits, torch.from_numpy(numbers["table"]), groups)

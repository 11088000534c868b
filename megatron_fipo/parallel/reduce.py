"""Loss statistics of all ranks, merged exactly."""

from collections.abc import Sequence

import torch
from torch.distributed import ReduceOp

from megatron_fipo.loss import LossStatistics
from megatron_fipo.parallel.replicas import Replicas


def reduce_statistics(statistics: Sequence[LossStatistics], replicas: Replicas) -> list[LossStatistics]:
    """Merge each update's statistics over the ranks, each of which knows those of its own tokens.

    Four reductions for a whole step, whatever its updates.
    """
    sums = replicas.all_reduce_pieces(torch.stack([s.sums for s in statistics]))
    minima = replicas.all_reduce_pieces(torch.stack([s.minima for s in statistics]), ReduceOp.MIN)
    maxima = replicas.all_reduce_pieces(torch.stack([s.maxima for s in statistics]), ReduceOp.MAX)
    histograms = replicas.all_reduce_pieces(torch.stack([s.histograms for s in statistics]))
    return [LossStatistics(*tensors) for tensors in zip(sums, minima, maxima, histograms, strict=True)]

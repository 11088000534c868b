"""Scans over sequences that are cut across context-parallel ranks, exact for any discount.

A scan y[t] = x[t] + gamma y[t + 1] is linear. With B[j] its value at the first token of chunk j when nothing comes in
from behind, and n tokens per chunk, its true value there is

    C[j] = B[j] + gamma^n C[j + 1] = sum over k >= j of gamma^(n (k - j)) B[k],        C[2 size] = 0,

and what comes into chunk j is C[j + 1]. So every rank tells the others the two B of each sequence, and that is all.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.ops import discounted_scan
from megatron_fipo.parallel.zigzag import chunks_of_ranks, run_cu_seqlens


class CarryExchange:
    """One all_gather, under way from construction until `wait`; no gradient passes through it.

    aggregate_R: fp32 [2 S], B of this rank's runs (fp64 only without counts). count_R: int32 [2 S], to be added up over
    the runs and ranks of a sequence. chunk_S: int [S], tokens per chunk. Every rank of the group takes part, whatever
    it holds. With fp32 and counts a rank sends 12 bytes per sequence.
    """

    def __init__(
        self, aggregate_R: Tensor, count_R: Tensor | None, chunk_S: Tensor, gamma: float, group: dist.ProcessGroup
    ) -> None:
        self._dtype = aggregate_R.dtype
        # aggregates travel as their bits, so one message of integers carries both without rounding
        message = aggregate_R.detach().view(torch.int32)
        self._words = message.shape[0]
        if count_R is not None:
            message = torch.cat([message, count_R.view(-1, 2).sum(1, dtype=torch.int32)])
        self._message = message  # alive until the collective has read it
        self._gathered = message.new_empty(group.size(), message.shape[0])
        self._work = dist.all_gather_into_tensor(self._gathered.view(-1), message, group=group, async_op=True)

        # While the message travels: gamma^(tokens between the chunk that a value comes from and the one it goes to).
        # Axes: rank and sequence that it comes from, the chunk of that rank, the chunk of this rank.
        chunk_I2 = chunks_of_ranks(group.size(), chunk_S.device)
        between = chunk_I2[:, None, :, None] - chunk_I2[group.rank()] - 1
        self._is_behind = between >= 0
        self._power = torch.pow(gamma, (between * chunk_S[:, None, None]).double())

    def wait(self) -> tuple[Tensor, Tensor]:
        """carry_R fp64 [2 S], the value just past the end of each of this rank's runs, and int64 [S], the counts of
        whole sequences ([0] without counts)."""
        assert self._work is not None  # None is for ranks outside the group
        self._work.wait()
        own, counts = self._gathered[:, : self._words], self._gathered[:, self._words :]
        aggregate = own.view(self._dtype).view(self._power.shape[:3]).unsqueeze(-1)
        # selected: what lies before a chunk, NaN included, has no influence on it
        carry_S2 = torch.where(self._is_behind, aggregate * self._power, 0.0).sum(dim=(0, 2))
        return carry_S2.flatten(), counts.sum(0)


def context_parallel_discounted_scan(
    x_T: Tensor, cu_seqlens_S1: Tensor, gamma: float, group: dist.ProcessGroup
) -> Tensor:
    """`discounted_scan` over the rest of each whole sequence, at this rank's tokens; without gradient.

    x_T: fp32 or fp64, this rank's tokens. cu_seqlens_S1: [S + 1], the padded ones of the whole pack.
    REINFORCE++ returns are the scan of the rewards. GAE needs no value of another rank either: with gamma lambda as
    the discount and V = 0 past the end, A = scan(r + (1 / lambda - 1) V) - V / lambda.
    """
    x_T = x_T.detach()
    if group.size() == 1:
        return discounted_scan(x_T, cu_seqlens_S1, gamma)
    runs_R1 = run_cu_seqlens(cu_seqlens_S1, group.size())
    own_T = discounted_scan(x_T, runs_R1, gamma)
    exchange = CarryExchange(first_of_run(own_T, runs_R1), None, runs_R1.diff()[::2], gamma, group)
    carry_R, _ = exchange.wait()
    return discounted_scan(x_T, runs_R1, gamma, carry=carry_R, out=own_T)


def first_of_run(values_T: Tensor, runs_R1: Tensor) -> Tensor:
    """[R]: the value at each run's first token, 0 for an empty run."""
    num_tokens = values_T.shape[0]
    if num_tokens == 0:
        return values_T.new_zeros(runs_R1.shape[0] - 1)
    return torch.where(runs_R1.diff() > 0, values_T[runs_R1[:-1].clamp(max=num_tokens - 1)], 0.0)

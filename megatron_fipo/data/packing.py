"""Samples to the packed (THD) tensors of one micro-batch.

Shape suffixes: _T packed positions, _S sequences, _S1 sequence boundaries, _R response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.data.samples import Sample
from megatron_fipo.ops.packed import sum_per_sequence
from megatron_fipo.parallel.zigzag import pad_cu_seqlens, run_cu_seqlens, token_index

# Takes the place of a micro-batch without samples, as collectives want every rank and DDP every gradient; fills packs.
_DUMMY = Sample(
    prompt_id=-1,
    group_id=-1,
    tokens=np.zeros(2, np.int32),
    response_mask=np.zeros(2, bool),
    rollout_logp=np.zeros(2, np.float32),
    finish_reason="stop",
    weight_versions=(),
    reward=0.0,
    correct=False,
)


@dataclass(frozen=True)
class RoutingRecord:
    """The experts chosen for one pack's tokens on this rank, filled in as old_logp's passes choose them.

    ``experts``: for each model chunk that has routed the pack (by its number), one tensor [tokens, top-k] for each of
    its routers, in the smallest dtype that holds an expert's number. Empty for a dense model.
    """

    experts: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one data-parallel replica, or one context-parallel rank's share of its tokens (:meth:`shard`).

    A sample of n tokens takes n - 1 positions; position t holds token t and predicts token t + 1, so every _T tensor
    is aligned with ``labels_T``: ``logp_T[t] = log p(labels_T[t])`` and ``response_mask_T[t]`` says whether
    ``labels_T[t]`` is a response token. Sequences may be padded at their ends; the mask is false there. Boundaries are
    those of the whole pack, also in a share of it.

    tokens_T, labels_T, position_ids_T  int64;  response_mask_T  bool
    rollout_logp_T  fp32, the engine's log-probs;  old_logp_T  fp32, the trainer's (None until computed)
    ref_logp_T  fp32, the reference model's log-probs (None: none asked for)
    token_weight_T  fp32, the importance correction (None: no correction)
    reward_T  fp32, a sample's reward at its last response token, 0 elsewhere
    advantage_S  fp32, or where it differs from token to token advantage_T  fp32 (both None until computed)
    loss_scale_S  fp32, the weight of each sequence's loss sum (None: token normalisation)
    cu_seqlens_S1, cu_seqlens_padded_S1  int32;  sample_ids_S, group_ids_S  int64
    boundaries  cu_seqlens_padded_S1 for the host, and response_R  int64, the positions where ``response_mask_T`` holds:
        known before the batch is on its device, so that no pass has to ask for them
    routing  shared by all copies of the batch
    """

    tokens_T: Tensor
    labels_T: Tensor
    position_ids_T: Tensor
    response_mask_T: Tensor
    rollout_logp_T: Tensor
    reward_T: Tensor
    old_logp_T: Tensor | None
    advantage_S: Tensor | None
    loss_scale_S: Tensor | None
    cu_seqlens_S1: Tensor
    cu_seqlens_padded_S1: Tensor
    sample_ids_S: Tensor
    group_ids_S: Tensor
    boundaries: tuple[int, ...]
    response_R: Tensor
    advantage_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    token_weight_T: Tensor | None = None
    routing: RoutingRecord = field(default_factory=RoutingRecord)

    def with_old_logp(self, old_logp_T: Tensor) -> "PackedBatch":
        """The same batch with the trainer's log-probs under the rollout's weights, fp32 [T]."""
        return replace(self, old_logp_T=old_logp_T)

    @property
    def advantage(self) -> Tensor | None:
        """[T] where it differs from token to token, else [S]."""
        return self.advantage_S if self.advantage_T is None else self.advantage_T

    def of_samples(self, values_S: Tensor) -> Tensor:
        """[S]: the values of this batch's samples among those of the step (on the batch's device); a dummy's are 0."""
        return torch.where(self.sample_ids_S >= 0, values_S[self.sample_ids_S], 0)

    def add_to_samples(self, totals_S: Tensor, values_T: Tensor, context_size: int) -> None:
        """Add to ``totals_S``, of the step's samples, what this share of their tokens sums to; a dummy is no sample."""
        pieces = self.cu_seqlens_padded_S1
        if context_size > 1:
            pieces = run_cu_seqlens(pieces, context_size)
        own_S = sum_per_sequence(values_T, pieces).view(len(self.sample_ids_S), -1).sum(1)
        real_S = self.sample_ids_S >= 0
        totals_S.index_add_(0, self.sample_ids_S[real_S], own_S[real_S].to(totals_S.dtype))

    def shard(self, rank: int, size: int) -> "PackedBatch":
        """The same batch with context-parallel rank ``rank``'s tokens alone, ordered as parallel/zigzag.py says."""
        if size == 1:
            return self
        index_t = token_index(self.cu_seqlens_padded_S1, len(self.tokens_T), rank, size)
        tokens = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_T")}
        own = {name: values_T[index_t] for name, values_T in tokens.items() if values_T is not None}
        return replace(self, response_R=own["response_mask_T"].nonzero()[:, 0], **own)

    def to(self, device: torch.device | int | str) -> "PackedBatch":
        """The same batch on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def pack(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    advantage_S: Tensor | None = None,
    loss_scale_S: Tensor | None = None,
    alignment: int = 1,
    pack_alignment: int = 1,
) -> PackedBatch:
    """Concatenate samples into one pack on the CPU, each padded to a multiple of ``alignment`` positions.

    ``sample_ids`` number the samples within the step; ``advantage_S`` and ``loss_scale_S`` are fp32 [S], in the same
    order. Without samples: a dummy sequence without a response token. Such a sequence, numbered -1, also fills the pack
    up to a multiple of ``pack_alignment`` positions, itself a multiple of ``alignment``.
    """
    if not samples:
        advantage_S, loss_scale_S = (None if x is None else torch.zeros(1) for x in (advantage_S, loss_scale_S))
        return pack([_DUMMY], [-1], advantage_S, loss_scale_S, alignment, pack_alignment)
    lengths_S = torch.tensor([len(s.tokens) - 1 for s in samples], dtype=torch.int32)
    cu_seqlens_S1 = torch.nn.functional.pad(lengths_S.cumsum(0, dtype=torch.int32), (1, 0))
    cu_seqlens_padded_S1 = pad_cu_seqlens(cu_seqlens_S1, alignment)
    tail = -int(cu_seqlens_padded_S1[-1]) % pack_alignment
    if tail:
        samples, sample_ids = [*samples, _DUMMY], [*sample_ids, -1]
        advantage_S, loss_scale_S = (
            None if x is None else torch.nn.functional.pad(x, (0, 1)) for x in (advantage_S, loss_scale_S)
        )
        lengths_S = torch.cat([lengths_S, torch.ones(1, dtype=torch.int32)])
        cu_seqlens_S1 = torch.cat([cu_seqlens_S1, cu_seqlens_S1[-1:] + 1])
        cu_seqlens_padded_S1 = torch.cat([cu_seqlens_padded_S1, cu_seqlens_padded_S1[-1:] + tail])
    shift_S = (cu_seqlens_padded_S1 - cu_seqlens_S1)[:-1]
    place = torch.arange(int(cu_seqlens_S1[-1])) + shift_S.repeat_interleave(lengths_S)

    def joined(rows: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        padded_T = torch.zeros(int(cu_seqlens_padded_S1[-1]), dtype=dtype)
        padded_T[place] = torch.from_numpy(np.concatenate(rows)).to(dtype)
        return padded_T

    response_mask_T = joined([s.response_mask[1:] for s in samples], torch.bool)
    return PackedBatch(
        tokens_T=joined([s.tokens[:-1] for s in samples], torch.int64),
        labels_T=joined([s.tokens[1:] for s in samples], torch.int64),
        position_ids_T=joined([np.arange(len(s.tokens) - 1) for s in samples], torch.int64),
        response_mask_T=response_mask_T,
        rollout_logp_T=joined([s.rollout_logp[1:] for s in samples], torch.float32),
        reward_T=joined([_reward_of_tokens(s) for s in samples], torch.float32),
        old_logp_T=None,
        advantage_S=advantage_S,
        loss_scale_S=loss_scale_S,
        cu_seqlens_S1=cu_seqlens_S1,
        cu_seqlens_padded_S1=cu_seqlens_padded_S1,
        sample_ids_S=torch.tensor(sample_ids, dtype=torch.int64),
        group_ids_S=torch.tensor([s.group_id for s in samples], dtype=torch.int64),
        boundaries=tuple(cu_seqlens_padded_S1.tolist()),
        response_R=response_mask_T.nonzero()[:, 0],
    )


def _reward_of_tokens(sample: Sample) -> np.ndarray:
    """fp32 [n - 1]: the reward at the position that predicts the last response token; without one, nowhere."""
    positions = np.arange(len(sample.tokens) - 1)
    last = np.flatnonzero(sample.response_mask[1:])[-1:]
    return np.where(np.isin(positions, last), sample.reward, 0.0).astype(np.float32)

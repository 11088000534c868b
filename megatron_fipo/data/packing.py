"""Samples to the packed (THD) tensors of one micro-batch.

Shape suffixes: _T packed positions, _S sequences, _S1 sequence boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.data.samples import Sample


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one data-parallel replica, before context-parallel sharding.

    A sample of n tokens takes n - 1 positions; position t holds token t and predicts token t + 1, so every _T tensor
    is aligned with ``labels_T``: ``logp_T[t] = log p(labels_T[t])`` and ``response_mask_T[t]`` says whether
    ``labels_T[t]`` is a response token.

    tokens_T, labels_T, position_ids_T  int64;  response_mask_T  bool
    rollout_logp_T  fp32, the engine's log-probs;  old_logp_T  fp32, the trainer's (None until computed)
    token_weight_T  fp32, the importance correction (None: no correction)
    advantage_S  fp32;  loss_scale_S  fp32, the weight of each sequence's loss sum (None: token normalisation)
    cu_seqlens_S1, cu_seqlens_padded_S1  int32;  sample_ids_S, group_ids_S  int64
    """

    tokens_T: Tensor
    labels_T: Tensor
    position_ids_T: Tensor
    response_mask_T: Tensor
    rollout_logp_T: Tensor
    old_logp_T: Tensor | None
    advantage_S: Tensor
    loss_scale_S: Tensor | None
    cu_seqlens_S1: Tensor
    cu_seqlens_padded_S1: Tensor
    sample_ids_S: Tensor
    group_ids_S: Tensor
    token_weight_T: Tensor | None = None

    def with_old_logp(self, old_logp_T: Tensor) -> "PackedBatch":
        """The same batch with the trainer's log-probs under the rollout's weights, fp32 [T]."""
        return replace(self, old_logp_T=old_logp_T)

    def to(self, device: torch.device | int | str) -> "PackedBatch":
        """The same batch on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: t.to(device, non_blocking=True) for k, t in tensors.items() if t is not None})


def pack(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    advantage_S: Tensor,
    loss_scale_S: Tensor | None = None,
) -> PackedBatch:
    """Concatenate samples into one pack on the CPU.

    ``sample_ids`` number the samples within the step; ``advantage_S`` and ``loss_scale_S`` are fp32 [S], in the same
    order.
    """
    lengths_S = [len(s.tokens) - 1 for s in samples]
    cu_seqlens_S1 = torch.zeros(len(samples) + 1, dtype=torch.int32)
    cu_seqlens_S1[1:] = torch.tensor(lengths_S).cumsum(0)

    def joined(rows: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(rows)).to(dtype)

    return PackedBatch(
        tokens_T=joined([s.tokens[:-1] for s in samples], torch.int64),
        labels_T=joined([s.tokens[1:] for s in samples], torch.int64),
        position_ids_T=joined([np.arange(n) for n in lengths_S], torch.int64),
        response_mask_T=joined([s.response_mask[1:] for s in samples], torch.bool),
        rollout_logp_T=joined([s.rollout_logp[1:] for s in samples], torch.float32),
        old_logp_T=None,
        advantage_S=advantage_S,
        loss_scale_S=loss_scale_S,
        cu_seqlens_S1=cu_seqlens_S1,
        cu_seqlens_padded_S1=cu_seqlens_S1,
        sample_ids_S=torch.tensor(sample_ids, dtype=torch.int64),
        group_ids_S=torch.tensor([s.group_id for s in samples], dtype=torch.int64),
    )

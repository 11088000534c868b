"""The weight of each sequence in the loss of a mini-batch."""

import torch
from torch import Tensor

from megatron_fipo.loss.config import NORMALIZATIONS


def loss_scale(normalization: str, tokens_S: Tensor, group_ids_S: Tensor | None = None) -> Tensor:
    """fp64 [S]: what each sequence's sum of token losses is multiplied by.

    tokens_S: response tokens of every sequence of the mini-batch, over all micro-batches and ranks, before the filter.
    group_ids_S: prompt of each sequence, for "group".
    token: 1, as the sum is divided once, by the kept tokens. sequence: 1 / (tokens of the sequence * sequences).
    group: 1 / (tokens of its group * groups), the paper's Eq. 8. Sequences and groups without a response token do not
    count. Raises ValueError for another normalisation or missing group_ids_S.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {normalization!r}")
    tokens_S = tokens_S.double()
    if normalization == "token":
        return torch.ones_like(tokens_S)
    if normalization == "sequence":
        unit_tokens_S, units = tokens_S, (tokens_S > 0).sum()
    else:
        if group_ids_S is None or group_ids_S.shape != tokens_S.shape:
            raise ValueError("normalization 'group' needs group_ids_S, one prompt id per sequence")
        groups, group_S = torch.unique(group_ids_S, return_inverse=True)
        tokens_G = tokens_S.new_zeros(groups.shape[0]).index_add(0, group_S, tokens_S)
        unit_tokens_S, units = tokens_G[group_S], (tokens_G > 0).sum()
    return torch.where(tokens_S > 0, 1.0 / (unit_tokens_S * units), 0.0)

"""The importance correction of a step's packed batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.loss import CorrectionConfig, FipoConfig, correction_metrics, importance_correction, loss_scale
from megatron_fipo.ops.packed import sum_per_sequence
from megatron_fipo.parallel.replicas import Replicas


def correct_updates(
    updates: Sequence[Sequence[PackedBatch]],
    config: CorrectionConfig,
    loss: FipoConfig,
    replicas: Replicas,
    num_samples: int,
) -> tuple[Sequence[Sequence[PackedBatch]], dict[str, float]]:
    """The batches with their ``token_weight_T``, and "correction/..." over all replicas; collective over the replicas.

    Comes after ``old_logp_T``. Where tokens are dropped and the loss is not normalised by tokens, ``loss_scale_S`` is
    made again from what is left. ``num_samples``: those of the step, over all replicas.
    """
    if not config.acts:
        return updates, {}
    corrected: list[list[PackedBatch]] = []
    statistics = []
    for micro_batches in updates:
        corrected.append([])
        for batch in micro_batches:
            assert batch.old_logp_T is not None, "old log-probs come before the correction"
            correction = importance_correction(
                batch.old_logp_T, batch.rollout_logp_T, batch.response_mask_T, batch.cu_seqlens_S1, config
            )
            corrected[-1].append(replace(batch, token_weight_T=correction.token_weight_T))
            statistics.append(correction.statistics_K)
    metrics = correction_metrics(replicas.all_reduce(torch.stack(statistics).sum(0)))
    if config.drops and loss.resolved_normalization != "token":
        scale_S = _loss_scale(corrected, loss, replicas, num_samples)
        corrected = [
            [replace(b, loss_scale_S=scale_S.to(b.tokens_T.device)[b.sample_ids_S]) for b in u] for u in corrected
        ]
    return corrected, metrics


def _loss_scale(
    updates: Sequence[Sequence[PackedBatch]], loss: FipoConfig, replicas: Replicas, num_samples: int
) -> Tensor:
    """fp32 [num_samples]: `loss_scale` of every sample within its update, by the tokens that were kept."""
    table = torch.zeros(3, num_samples, dtype=torch.int64)  # kept tokens, group, number of the update from 1
    for number, micro_batches in enumerate(updates, start=1):
        for batch in micro_batches:
            assert batch.token_weight_T is not None
            kept_T = batch.response_mask_T & (batch.token_weight_T != 0)
            tokens_S = sum_per_sequence(kept_T, batch.cu_seqlens_S1)
            table[:, batch.sample_ids_S.cpu()] = torch.stack(
                [tokens_S.long(), batch.group_ids_S, torch.full_like(batch.group_ids_S, number)]
            ).cpu()
    tokens_S, group_S, update_S = replicas.all_reduce(table)
    scale_S = torch.zeros(num_samples)
    for number in range(1, len(updates) + 1):
        own_S = update_S == number
        scale_S[own_S] = loss_scale(loss.resolved_normalization, tokens_S[own_S], group_S[own_S]).float()
    return scale_S

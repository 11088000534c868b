"""The importance correction of a step's packed batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_fipo.data.batches import loss_scale_of_samples
from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.loss import CorrectionConfig, LossConfig, correction_metrics
from megatron_fipo.loss.correction import STATISTICS
from megatron_fipo.parallel.correction import context_parallel_correction
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout


def correct_updates(
    updates: list[list[PackedBatch]],
    plan: Sequence[UpdatePlan],
    rollout: Rollout,
    config: CorrectionConfig,
    loss: LossConfig,
    replicas: Replicas,
) -> tuple[list[list[PackedBatch]], dict[str, float]]:
    """The batches with their ``token_weight_T``, and "correction/..." over all tokens; collective over all ranks.

    Comes after ``old_logp_T``; where a pipeline stage has none, batches stay as they are. Where tokens are dropped and
    the loss is not normalised by tokens, ``loss_scale_S`` is made again from what is left.
    """
    if not config.acts:
        return updates, {}
    statistics_K = torch.zeros(len(STATISTICS), dtype=torch.float64, device=replicas.device)
    kept_tokens_S = torch.zeros(len(rollout.reward_S), dtype=torch.int64, device=replicas.device)

    def corrected(batch: PackedBatch) -> PackedBatch:
        if batch.old_logp_T is None:
            return batch
        correction = context_parallel_correction(
            batch.old_logp_T,
            batch.rollout_logp_T,
            batch.response_mask_T,
            batch.cu_seqlens_padded_S1,
            config,
            replicas.context,
        )
        statistics_K.add_(correction.statistics_K)
        kept_T = batch.response_mask_T & (correction.token_weight_T != 0)
        batch.add_to_samples(kept_tokens_S, kept_T, replicas.context.size())
        return replace(batch, token_weight_T=correction.token_weight_T)

    updates = [[corrected(batch) for batch in micro_batches] for micro_batches in updates]
    metrics = correction_metrics(replicas.all_reduce_pieces(statistics_K))
    if config.drops and loss.resolved_normalization != "token":
        tokens_S = replicas.all_reduce_pieces(kept_tokens_S)
        scale_S = loss_scale_of_samples(plan, tokens_S, rollout.group_ids_S, loss).to(replicas.device)
        updates = [[replace(batch, loss_scale_S=batch.of_samples(scale_S)) for batch in update] for update in updates]
    return updates, metrics

"""The advantages of a step's packed batches."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.loss import AdvantageConfig, group_advantage
from megatron_fipo.loss.advantage import STD_FLOOR
from megatron_fipo.loss.kl import kl_estimate
from megatron_fipo.parallel.carry import context_parallel_discounted_scan
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout


def add_advantages(
    updates: Sequence[Sequence[PackedBatch]], rollout: Rollout, config: AdvantageConfig, replicas: Replicas
) -> tuple[list[list[PackedBatch]], dict[str, float]]:
    """The batches with ``advantage_S``, for "batch" with ``advantage_T``; collective over all ranks.

    Comes after ``old_logp_T`` and ``ref_logp_T``, which the KL in the reward wants; where a pipeline stage has no
    log-probs, batches stay as they are. Metrics: "reward/reference_kl", the mean over response tokens of that KL.
    """
    reward_S, metrics = rollout.reward_S.double(), {}
    if config.kl_weight:
        kl_S = torch.zeros(len(reward_S), dtype=torch.float64, device=replicas.device)
        for batch in (batch for update in updates for batch in update if batch.old_logp_T is not None):
            batch.add_to_samples(kl_S, _kl(batch, config), replicas.context.size())
        kl_S = replicas.all_reduce_pieces(kl_S)
        reward_S = reward_S - config.kl_weight * kl_S
        metrics["reward/reference_kl"] = kl_S.sum().item() / max(rollout.response_tokens_S.sum().item(), 1)
    if config.kind == "batch":
        return _of_tokens(updates, config, replicas), metrics
    advantage_S = group_advantage(reward_S, rollout.group_ids_S, config.kind).to(replicas.device)
    return [
        [replace(batch, advantage_S=batch.of_samples(advantage_S)) for batch in update] for update in updates
    ], metrics


def _of_tokens(
    updates: Sequence[Sequence[PackedBatch]], config: AdvantageConfig, replicas: Replicas
) -> list[list[PackedBatch]]:
    """REINFORCE++'s: returns of token-level rewards, normalised over all response tokens of the step.

    In fp64, and in two passes: the rounding of a mean of squares would depend on how far the mean is from 0.
    """
    with_returns = [[_with_returns(batch, config, replicas) for batch in update] for update in updates]
    inside = [
        batch.advantage_T[batch.response_mask_T]
        for update in with_returns
        for batch in update
        if batch.advantage_T is not None
    ]
    own_N = torch.cat([*inside, torch.zeros(0, dtype=torch.float64, device=replicas.device)])
    total, tokens = replicas.all_reduce_pieces(torch.stack([own_N.sum(), own_N.new_tensor(len(own_N))])).tolist()
    mean = total / max(tokens, 1)
    (square,) = replicas.all_reduce_pieces((own_N - mean).square().sum()[None]).tolist()
    std = math.sqrt(square / max(tokens - 1, 1))

    def normalized(batch: PackedBatch) -> PackedBatch:
        if batch.advantage_T is None:
            return batch
        advantage_T = (batch.advantage_T - mean) / (std + STD_FLOOR)
        return replace(batch, advantage_T=torch.where(batch.response_mask_T, advantage_T, 0.0).float())

    return [[normalized(batch) for batch in update] for update in with_returns]


def _with_returns(batch: PackedBatch, config: AdvantageConfig, replicas: Replicas) -> PackedBatch:
    """``advantage_T`` fp64: the discounted sum of the rewards from each token on; no response costs a step of decay."""
    if batch.old_logp_T is None:
        return batch
    reward_T = torch.where(batch.response_mask_T, batch.reward_T, 0.0).double()
    if config.kl_weight:
        reward_T = reward_T - config.kl_weight * _kl(batch, config)
    return_T = context_parallel_discounted_scan(reward_T, batch.cu_seqlens_padded_S1, config.gamma, replicas.context)
    return replace(batch, advantage_T=return_T)


def _kl(batch: PackedBatch, config: AdvantageConfig) -> Tensor:
    """fp64 [T]: of the policy that the updates start from, at the response tokens."""
    assert batch.old_logp_T is not None and batch.ref_logp_T is not None, "log-probs come before advantages"
    return kl_estimate(batch.old_logp_T, batch.ref_logp_T, batch.response_mask_T, config.kl_estimator).double()

"""A rollout to the packed micro-batches that this replica trains on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch, pack
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.data.samples import Sample
from megatron_fipo.loss import LossConfig, loss_scale
from megatron_fipo.parallel.exchange import send_to_replicas
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import Rollout


def make_micro_batches(
    plan: Sequence[UpdatePlan], rollout: Rollout, loss: LossConfig, replicas: Replicas
) -> list[list[PackedBatch]]:
    """Send every sample to the replica that the plan gives it to, and pack what arrives: [update][micro-batch].

    A batch holds this rank's context-parallel share of its tokens.
    """
    context = replicas.context
    outgoing: list[dict[int, Sample]] = [{} for _ in range(replicas.size)]
    for update in plan:
        for destination, micro_batches in enumerate(update.micro_batches):
            outgoing[destination].update({i: rollout.held[i] for mb in micro_batches for i in mb if i in rollout.held})
    samples = send_to_replicas(outgoing, replicas.group, replicas.device)
    scale_S = None
    if loss.resolved_normalization != "token":
        scale_S = loss_scale_of_samples(plan, rollout.response_tokens_S, rollout.group_ids_S, loss)
    return [
        [
            pack(
                [samples[i] for i in mb],
                mb,
                loss_scale_S=None if scale_S is None else scale_S[list(mb)],
                alignment=update.alignment,
                pack_alignment=update.pack_alignment,
            )
            .shard(context.rank(), context.size())
            .to(replicas.device)
            for mb in update.micro_batches[replicas.rank]
        ]
        for update in plan
    ]


def loss_scale_of_samples(
    plan: Sequence[UpdatePlan], tokens_S: Tensor, group_ids_S: Tensor, loss: LossConfig
) -> Tensor:
    """The weight of each sample's loss sum within its update, fp32 [S].

    ``tokens_S`` are the response tokens that count, ``group_ids_S`` the groups, int64 [S]; for normalizations other
    than "token", where token counts divide instead.
    """
    scale_S = torch.empty(len(tokens_S))
    for update in plan:
        members = sorted(i for micro_batches in update.micro_batches for mb in micro_batches for i in mb)
        scale_S[members] = loss_scale(loss.resolved_normalization, tokens_S[members], group_ids_S[members]).float()
    return scale_S

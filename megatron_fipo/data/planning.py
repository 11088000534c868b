"""Which sample goes into which update, replica and micro-batch.

Every rank computes the same plan from the same lengths, so nothing but the samples themselves has to move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo._host import pack_step
from megatron_fipo.model.cost import CostModel

MicroBatch = tuple[int, ...]
"""Sample numbers of one pack, ascending. Empty: no sample is left for this replica's turn, and it takes part with a
dummy pack without a response token, because a collective would hang on a missing one."""


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer update: ``micro_batches[replica]`` are the packs of that replica, equally many on each.

    They run from the costliest to the cheapest, so that a shortage of memory shows at once. Sequences are counted, and
    have to be packed, with lengths that are multiples of ``alignment``, and packs are filled up to multiples of
    ``pack_alignment``.
    """

    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    alignment: int = 1
    pack_alignment: int = 1


def plan_step(
    lengths_S: Sequence[int],
    samples_per_update: int,
    replicas: int,
    max_tokens: int,
    *,
    cost: CostModel,
    pipeline_stages: int = 1,
    alignment: int = 1,
    pack_alignment: int = 1,
    micro_batch_multiple: int = 1,
) -> list[UpdatePlan]:
    """Cut the samples, in order, into updates, and spread each update over replicas and micro-batches.

    ``lengths_S`` are packed lengths in tokens; each is rounded up to a multiple of ``alignment``, as the packs will be
    (see :func:`megatron_fipo.settings.sequence_alignment`). A micro-batch holds at most ``max_tokens``, the positions
    that fill it up to a multiple of ``pack_alignment`` included; a longer sequence gets one of its own.
    ``micro_batch_multiple`` divides a replica's number of micro-batches (an interleaved pipeline wants its number of
    stages).

    The plan keeps the slowest replica short, whose m micro-batches of cost c take ``sum(c) + (pipeline_stages - 1) *
    max(c)`` (m equal ones: (m + pipeline_stages - 1) * c), so both the replicas and the packs of one replica are level.
    It has the fewest micro-batches that the method finds room in, or a few more where those come out uneven. No pack is
    empty unless there are more packs than samples. The method, in csrc/host/packing.cpp: longest first to the cheapest
    pack with room (Graham 1969), then exchanges of single sequences with the slowest replica.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    packs = pack_step(
        lengths_S,
        samples_per_update,
        linear=cost.linear,
        quadratic=cost.quadratic,
        replicas=replicas,
        pipeline_stages=pipeline_stages,
        max_tokens=max_tokens // pack_alignment * pack_alignment,
        alignment=alignment,
        micro_batch_multiple=micro_batch_multiple,
    )
    return [UpdatePlan(micro_batches, alignment, pack_alignment) for micro_batches in packs]

"""Which sample goes into which update, replica and micro-batch.

Every rank computes the same plan from the same lengths, so nothing but the samples themselves has to move.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

MicroBatch = tuple[int, ...]
"""Sample numbers of one pack."""


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer update: ``micro_batches[replica]`` are the packs of that replica, equally many on each."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]


def plan_step(lengths_S: Sequence[int], samples_per_update: int, replicas: int, max_tokens: int) -> list[UpdatePlan]:
    """Cut the samples, in order, into updates, and spread each update over replicas and micro-batches.

    ``lengths_S`` are packed lengths in tokens. A micro-batch holds at most ``max_tokens``; a longer sequence gets one
    of its own. Longest-first assignment to the lightest pack keeps packs level; every replica gets the same number of
    packs, none of them empty (a collective would hang on a missing one).
    """
    return [
        _plan_update(range(start, start + samples_per_update), lengths_S, replicas, max_tokens)
        for start in range(0, len(lengths_S), samples_per_update)
    ]


def _plan_update(samples: range, lengths_S: Sequence[int], replicas: int, max_tokens: int) -> UpdatePlan:
    longest_first = sorted(samples, key=lambda i: (-lengths_S[i], i))
    most = len(samples) // replicas  # one sample per pack
    total = sum(lengths_S[i] for i in samples)
    for per_replica in range(min(most, math.ceil(total / (replicas * max_tokens))), most + 1):
        packs: list[list[int]] = [[] for _ in range(per_replica * replicas)]
        lightest = [(0, k) for k in range(len(packs))]
        for i in longest_first:
            tokens, k = heapq.heappop(lightest)
            packs[k].append(i)
            heapq.heappush(lightest, (tokens + lengths_S[i], k))
        if all(len(p) == 1 or sum(lengths_S[i] for i in p) <= max_tokens for p in packs):
            break
    # Heaviest packs are dealt first and to the lightest replica, so replicas finish together.
    by_weight = sorted((tuple(sorted(p)) for p in packs), key=lambda p: (-sum(lengths_S[i] for i in p), p))
    dealt: list[list[MicroBatch]] = [[] for _ in range(replicas)]
    for start in range(0, len(by_weight), replicas):
        order = sorted(range(replicas), key=lambda r: (sum(lengths_S[i] for p in dealt[r] for i in p), r))
        for replica, pack in zip(order, by_weight[start : start + replicas], strict=True):
            dealt[replica].append(pack)
    return UpdatePlan(tuple(tuple(packs_of) for packs_of in dealt))

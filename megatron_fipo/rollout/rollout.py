"""The samples of one step: those that are trained on, and the numbers of all that were generated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.data.samples import Sample
from megatron_fipo.rollout.leftovers import Leftovers


@dataclass(frozen=True, eq=False)
class GeneratedSamples:
    """Every sample of a step over all replicas, in the order of its prompts. Columns are fp64 [generated].

    ``tokens`` counts prompt and response; ``correct``, ``truncated``, ``verifier_failed`` are 0 or 1.
    """

    COLUMNS: ClassVar = ("tokens", "response_tokens", "reward", "correct", "truncated", "verifier_failed")

    tokens: Tensor
    response_tokens: Tensor
    reward: Tensor
    correct: Tensor
    truncated: Tensor
    verifier_failed: Tensor

    @staticmethod
    def row(sample: Sample, verifier_failed: bool) -> list[float]:
        """One sample's numbers, in the order of the columns."""
        response_tokens = int(sample.response_mask.sum())
        truncated = sample.finish_reason == "length"
        return [len(sample.tokens), response_tokens, sample.reward, sample.correct, truncated, verifier_failed]

    @classmethod
    def of(cls, table: Tensor) -> "GeneratedSamples":
        """From rows, fp64 [..., columns]."""
        return cls(*table.flatten(0, -2).unbind(-1))


@dataclass(frozen=True, eq=False)
class Rollout:
    """What a step trains on. Its S samples are numbered in the order of their prompts, groups contiguous.

    held               this replica's samples, by number
    packed_length_S    int64, positions that each sample takes in a pack
    response_tokens_S  int64, those in the loss
    reward_S           fp32
    group_ids_S        int64
    table              fp64 [groups, group size, columns], every sample of the step: first those of the ``carried``
                       groups, which the step before left over, then those that were generated
    kept               the table's groups that are trained on
    visits             the visit number of each group of the table
    carried            groups left over by the step before; all are kept, and their samples are the first ones
    batches            generation batches that it took
    leftovers          what the next step starts with (None: nothing)
    """

    held: dict[int, Sample]
    packed_length_S: Tensor
    response_tokens_S: Tensor
    reward_S: Tensor
    group_ids_S: Tensor
    table: Tensor
    kept: tuple[int, ...]
    visits: tuple[int, ...]
    batches: int
    carried: int = 0
    leftovers: Leftovers | None = None

    @classmethod
    def of(
        cls,
        table: Tensor,
        kept: Sequence[int],
        visits: Sequence[int],
        groups: Mapping[int, Sequence[Sample]],
        batches: int,
        carried: int = 0,
    ) -> "Rollout":
        """Number the samples of the ``kept`` groups; ``groups`` are this replica's, by visit."""
        size = table.shape[1]
        index = torch.tensor(kept)
        samples = GeneratedSamples.of(table[index])
        rollout = cls(
            held={
                position * size + i: sample
                for position, group in enumerate(kept)
                for i, sample in enumerate(groups.get(visits[group], ()))
            },
            packed_length_S=samples.tokens.long() - 1,
            response_tokens_S=samples.response_tokens.long(),
            reward_S=samples.reward.float(),
            group_ids_S=torch.tensor(visits)[index].repeat_interleave(size),
            table=table,
            kept=tuple(kept),
            visits=tuple(visits),
            batches=batches,
            carried=carried,
        )
        spare = rollout.spare
        if not spare:
            return rollout
        spare_visits = tuple(visits[group] for group in spare)
        held = {visit: groups[visit] for visit in spare_visits if visit in groups}
        return replace(rollout, leftovers=Leftovers(spare_visits, table[spare], held))

    def without_truncated(self) -> "Rollout":
        """DAPO's overlong filter: responses that ran into the length limit keep their reward and leave the loss."""
        truncated_S = GeneratedSamples.of(self.table[list(self.kept)]).truncated.bool()
        return replace(
            self,
            held={
                i: replace(sample, response_mask=np.zeros_like(sample.response_mask)) if truncated_S[i] else sample
                for i, sample in self.held.items()
            },
            response_tokens_S=self.response_tokens_S.masked_fill(truncated_S, 0),
        )

    @property
    def generated(self) -> GeneratedSamples:
        """Every sample that was generated in this step, kept or not."""
        return GeneratedSamples.of(self.table[self.carried :])

    @property
    def spare(self) -> list[int]:
        """The table's groups with contrast that are not trained on in this step but in the next.

        Not all, if there are many: the next step generates too, and trains on all that it is left.
        """
        unused = sorted(set(has_contrast(self.table).nonzero()[:, 0].tolist()) - set(self.kept))
        return unused[: len(self.kept) - 1]

    @property
    def stale_samples(self) -> int:
        """So many of the samples, the first ones, were drawn by the weights of one step earlier."""
        return self.carried * self.table.shape[1]

    @property
    def contrast_rate(self) -> float:
        """Share of the generated groups that hold right and wrong answers."""
        return has_contrast(self.table[self.carried :]).double().mean().item()


def has_contrast(table: Tensor) -> Tensor:
    """bool [groups]: the group holds right and wrong answers (correctness, not reward, as DAPO's dynamic sampling)."""
    right = table[..., GeneratedSamples.COLUMNS.index("correct")].sum(1)
    return (right > 0) & (right < table.shape[1])

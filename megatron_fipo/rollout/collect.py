"""Dynamic sampling (DAPO): generate groups until enough of them hold right and wrong answers.

Groups with contrast beyond those that a step needs are left over for the next one, which trains on them first.
Each replica generates and keeps its own share; only one small row per sample crosses replicas, and from these rows
every rank draws the same conclusions: which groups are kept, when to stop, what the step's statistics are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.data.prompts import Prompt, PromptStream
from megatron_fipo.data.samples import Sample
from megatron_fipo.errors import SharedUserError
from megatron_fipo.loss.advantage import overlong_penalty
from megatron_fipo.parallel.exchange import gather_in_turn
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.response import Verdict
from megatron_fipo.rollout.engine import Completion, SamplingParams
from megatron_fipo.rollout.leftovers import Leftovers
from megatron_fipo.rollout.responder import Responds
from megatron_fipo.rollout.rollout import GeneratedSamples, Rollout, has_contrast
from megatron_fipo.rollout.seeds import completion_seed

Verify = Callable[[Sequence[tuple[Prompt, Completion]]], list[Verdict]]
"""A verdict for each (prompt, response)."""

_OVERSAMPLING = 3.0
"""A batch never exceeds this many times the groups still missing (DAPO's gen_batch_size / train_batch_size)."""


class OutOfContrast(SharedUserError):
    """The generation batches of a step did not bring enough groups with right and wrong answers."""


@dataclass(frozen=True)
class CollectSettings:
    """What a step's rollout consists of."""

    prompts_per_step: int
    group_size: int
    sampling: SamplingParams
    seed: int
    dynamic_sampling: bool
    max_batches: int
    overlong_buffer: int
    overlong_penalty: float


def collect(
    responder: Responds,
    stream: PromptStream,
    verify: Verify,
    settings: CollectSettings,
    replicas: Replicas,
    *,
    version: int,
    contrast_rate: float,
    on_finished: Callable[[int], None],
    leftovers: Leftovers | None = None,
) -> Rollout:
    """Generate until ``settings.prompts_per_step`` groups are kept, the ``leftovers`` of the step before first.

    ``version`` labels the weights that generate. ``contrast_rate`` is the share of groups expected to be kept (the last
    step's); it sizes the first batch so that one is usually enough. Raises OutOfContrast after
    ``settings.max_batches`` batches that did not bring enough.
    """
    needed = settings.prompts_per_step
    carried = leftovers or Leftovers.none(settings.group_size, len(GeneratedSamples.COLUMNS))
    carried = carried.first(needed - 1)  # every step generates, and trains on all it carries: nothing gets older
    own, tables, visits = dict(carried.held), [carried.table], list(carried.visits)
    kept = list(range(len(visits)))
    for batch in range(1, settings.max_batches + 1):
        count = groups_to_generate(needed - len(kept), contrast_rate, settings)
        taken = stream.take(count)
        mine = taken[replicas.rank :: replicas.size]
        groups = _generate(responder, mine, verify, settings, replicas, version, on_finished)
        own.update((visit, [sample for sample, _ in group]) for (visit, _), group in zip(mine, groups, strict=True))
        tables.append(_gathered(groups, count, settings.group_size, replicas))
        visits += [visit for visit, _ in taken]

        table = torch.cat(tables)
        contrast = has_contrast(table)
        kept = (contrast.nonzero()[:, 0] if settings.dynamic_sampling else torch.arange(len(table))).tolist()[:needed]
        contrast_rate = contrast[len(carried.visits) :].double().mean().item()
        if len(kept) == needed:
            return Rollout.of(table, kept, visits, own, batch, len(carried.visits))
    accuracy = GeneratedSamples.of(table[len(carried.visits) :]).correct.mean().item()
    raise OutOfContrast(
        f"only {len(kept)} of {needed} groups hold both right and wrong answers after {batch} generation batches "
        f"(accuracy {accuracy:.3f}); use prompts nearer to the model's level, raise --rollout-max-batches, or lower "
        f"--grpo-prompts-per-step"
    )


def groups_to_generate(missing: int, contrast_rate: float, settings: CollectSettings) -> int:
    """Groups that should bring ``missing`` ones with contrast, if the rate holds."""
    return math.ceil(missing / max(contrast_rate, 1 / _OVERSAMPLING)) if settings.dynamic_sampling else missing


def _gathered(groups: list[list[tuple[Sample, bool]]], count: int, group_size: int, replicas: Replicas) -> Tensor:
    """The rows of all ``count`` groups in the order of their prompts, fp64 [count, group_size, columns]."""
    rows = torch.zeros(math.ceil(count / replicas.size), group_size, len(GeneratedSamples.COLUMNS), dtype=torch.float64)
    for i, group in enumerate(groups):
        rows[i] = torch.tensor([GeneratedSamples.row(sample, failed) for sample, failed in group])
    return gather_in_turn(rows.to(replicas.device), count, replicas.group)


def _generate(
    responder: Responds,
    visits: list[tuple[int, Prompt]],
    verify: Verify,
    settings: CollectSettings,
    replicas: Replicas,
    version: int,
    on_finished: Callable[[int], None],
) -> list[list[tuple[Sample, bool]]]:
    """One group of (sample, verifier failed) for each (visit, prompt)."""
    requests = [(visit, prompt, i) for visit, prompt in visits for i in range(settings.group_size)]
    completions = responder.respond(
        [prompt for _, prompt, _ in requests],
        [completion_seed(settings.seed, "train", visit, i) for visit, _, i in requests],
        settings.sampling,
        on_finished,
    )
    penalties = _overlong_penalties(completions, settings)
    # Judged once: a verifier that just meets or misses its timeout would tell the ranks of a replica different things.
    answers = [(prompt, completion) for (_, prompt, _), completion in zip(requests, completions, strict=True)]
    verdicts = replicas.from_leader(lambda: verify(answers))
    scored = [
        (_sample(visit, prompt, completion, verdict, penalty, version), verdict.error is not None)
        for (visit, prompt, _), completion, verdict, penalty in zip(
            requests, completions, verdicts, penalties, strict=True
        )
    ]
    return [scored[k : k + settings.group_size] for k in range(0, len(scored), settings.group_size)]


def _overlong_penalties(completions: Sequence[Completion], settings: CollectSettings) -> list[float]:
    if not settings.overlong_buffer:
        return [0.0] * len(completions)
    lengths = torch.tensor([len(c.tokens) for c in completions])
    limit = settings.sampling.max_tokens
    return overlong_penalty(lengths, limit, settings.overlong_buffer, settings.overlong_penalty).tolist()


def _sample(
    visit: int, prompt: Prompt, completion: Completion, verdict: Verdict, penalty: float, version: int
) -> Sample:
    n_prompt, n_response = len(prompt.tokens), len(completion.tokens)
    generated = np.ones(n_response, bool) if completion.generated is None else np.array(completion.generated, bool)
    return Sample(
        prompt_id=prompt.id,
        group_id=visit,
        tokens=np.array(prompt.tokens + completion.tokens, dtype=np.int32),
        response_mask=np.concatenate([np.zeros(n_prompt, bool), generated]),
        rollout_logp=np.concatenate([np.zeros(n_prompt, np.float32), np.array(completion.logp, np.float32)]),
        finish_reason=completion.finish_reason,
        weight_versions=((version, 0, n_response),),
        reward=verdict.reward + penalty,
        correct=verdict.correct,
    )

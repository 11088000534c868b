"""avg@k, pass@k and cons@k on held-out prompts, shared out over the replicas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.evaluation.estimators import summarize
from megatron_fipo.evaluation.voting import consensus
from megatron_fipo.observe.console import Console
from megatron_fipo.parallel.exchange import gather_in_turn
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.response import Verdict
from megatron_fipo.rollout.engine import Completion, ProgressCallback, SamplingParams
from megatron_fipo.rollout.responder import Responds
from megatron_fipo.rollout.seeds import completion_seed


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out prompts under a name, ``samples`` responses each."""

    name: str
    prompts: tuple[Prompt, ...]
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` over all replicas under "eval/NAME/...", and responses of this replica's prompts by set."""

    metrics: dict[str, float] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The first response to a few prompts of each set."""
        return [r for records in self.records.values() for r in [r for r in records if r["sample"] == 0][:_EXAMPLES]]


_EXAMPLES = 4
_COLUMNS = 5  # correct, tokens, truncated, failed, majority (of the prompt)


def evaluate_sets(
    responder: Responds,
    sets: Sequence[EvaluationSet],
    sampling: SamplingParams,
    answers: Answers,
    replicas: Replicas,
    seed: int,
    console: Console,
) -> Evaluation:
    """Sampled and greedy accuracy of every set; collective over the replicas.

    Seeds depend on the run, the set and the prompt only, so the evaluations of a run are comparable.
    """
    evaluation = Evaluation()
    for evaluation_set in sets:
        prefix = f"eval/{evaluation_set.name}/"
        responses = len(evaluation_set.prompts) * (evaluation_set.samples + 1)
        with console.progress(f"evaluation {evaluation_set.name}", responses) as progress:

            def advance(n: int, bar: Any = progress) -> None:
                bar.advance(n * replicas.size)

            sampled, records = _evaluate(responder, evaluation_set, sampling, answers, replicas, seed, advance)
            greedy_set = replace(evaluation_set, samples=1)
            greedy, _ = _evaluate(
                responder, greedy_set, replace(sampling, temperature=0.0), answers, replicas, seed, advance
            )
        evaluation.metrics.update({prefix + key: value for key, value in sampled.items()})
        evaluation.metrics[f"{prefix}greedy_accuracy"] = greedy["accuracy"]
        evaluation.records[evaluation_set.name] = records
    return evaluation


def _judge(
    answers: Answers, responses: Sequence[tuple[Prompt, Completion]], samples: int
) -> tuple[list[Verdict], list[str | None], list[float]]:
    """Of each response the verdict and the final answer; of each prompt whether most of its ``samples`` are right."""
    verdicts = answers.verify(responses)
    finals = [answers.final_answer(prompt, completion.tokens) for prompt, completion in responses]
    groups = [slice(start, start + samples) for start in range(0, len(responses), samples)]
    majorities = consensus(
        [finals[group] for group in groups],
        [[verdict.correct for verdict in verdicts[group]] for group in groups],
        lambda pairs: answers.equal([(responses[i * samples][0], a, b) for i, a, b in pairs]),
    )
    return verdicts, finals, majorities


def _evaluate(
    responder: Responds,
    evaluation_set: EvaluationSet,
    sampling: SamplingParams,
    answers: Answers,
    replicas: Replicas,
    seed: int,
    on_finished: ProgressCallback,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    count, samples = len(evaluation_set.prompts), evaluation_set.samples
    mine = list(enumerate(evaluation_set.prompts))[replicas.rank :: replicas.size]
    requests = [(number, prompt, k) for number, prompt in mine for k in range(samples)]
    completions = responder.respond(
        [prompt for _, prompt, _ in requests],
        [completion_seed(seed, evaluation_set.name, number, k) for number, _, k in requests],
        sampling,
        on_finished,
    )
    responses = [(prompt, completion) for (_, prompt, _), completion in zip(requests, completions, strict=True)]
    verdicts, finals, majorities = replicas.from_leader(lambda: _judge(answers, responses, samples))
    rows = torch.zeros(math.ceil(count / replicas.size), samples, _COLUMNS, dtype=torch.float64)
    for i, (completion, verdict) in enumerate(zip(completions, verdicts, strict=True)):
        truncated, failed = completion.finish_reason == "length", verdict.error is not None
        numbers = [verdict.correct, len(completion.tokens), truncated, failed, majorities[i // samples]]
        rows[i // samples, i % samples] = torch.tensor(numbers, dtype=torch.float64)
    table = gather_in_turn(rows.to(replicas.device), count, replicas.group).numpy()
    metrics = summarize(
        table[..., 0].astype(bool),
        table[..., 1].astype(np.int64),
        table[..., 2].astype(bool),
        table[..., 3].astype(bool),
        table[:, 0, 4],
    )
    records = [
        answers.record(prompt, completion.tokens, verdict.correct)
        | {"number": number, "sample": k, "final_answer": final, "tokens": len(completion.tokens)}
        | {"truncated": completion.finish_reason == "length", "error": verdict.error}
        for (number, prompt, k), completion, verdict, final in zip(requests, completions, verdicts, finals, strict=True)
    ]
    return metrics, records

"""avg@k: the mean accuracy of k sampled responses per held-out prompt, shared out over the replicas."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.observe.console import Console
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rollout.engine import ProgressCallback, RolloutEngine, SamplingParams
from megatron_fipo.rollout.seeds import completion_seed


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out prompts under a name, ``samples`` responses each."""

    name: str
    prompts: tuple[Prompt, ...]
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` over all replicas under "eval/NAME/...", and a few of this replica's responses."""

    metrics: dict[str, float] = field(default_factory=dict)
    examples: tuple[dict[str, Any], ...] = ()


def evaluate_sets(
    engine: RolloutEngine,
    sets: Sequence[EvaluationSet],
    sampling: SamplingParams,
    answers: Answers,
    replicas: Replicas,
    seed: int,
    console: Console,
    examples: int = 4,
) -> Evaluation:
    """Sampled and greedy accuracy of every set; collective over the replicas.

    Seeds depend on the run, the set and the prompt only, so the evaluations of a run are comparable.
    """
    metrics: dict[str, float] = {}
    shown: list[dict[str, Any]] = []
    for evaluation_set in sets:
        prefix = f"eval/{evaluation_set.name}/"
        responses = len(evaluation_set.prompts) * (evaluation_set.samples + 1)
        with console.progress(f"evaluation {evaluation_set.name}", responses) as progress:

            def advance(n: int, bar: Any = progress) -> None:
                bar.advance(n * replicas.size)

            sampled, records = _evaluate(engine, evaluation_set, sampling, answers, replicas, seed, advance)
            greedy_set = replace(evaluation_set, samples=1)
            greedy, _ = _evaluate(
                engine, greedy_set, replace(sampling, temperature=0.0), answers, replicas, seed, advance
            )
        metrics |= {prefix + key: value for key, value in sampled.items()}
        metrics[f"{prefix}greedy_accuracy"] = greedy["accuracy"]
        shown += records[:examples]
    return Evaluation(metrics, tuple(shown))


def _evaluate(
    engine: RolloutEngine,
    evaluation_set: EvaluationSet,
    sampling: SamplingParams,
    answers: Answers,
    replicas: Replicas,
    seed: int,
    on_finished: ProgressCallback,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    mine = list(enumerate(evaluation_set.prompts))[replicas.rank :: replicas.size]
    requests = [(number, prompt, k) for number, prompt in mine for k in range(evaluation_set.samples)]
    completions = engine.generate(
        [prompt.tokens for _, prompt, _ in requests],
        [completion_seed(seed, evaluation_set.name, number, k) for number, _, k in requests],
        sampling,
        on_finished,
    )
    verdicts = answers.verify([(prompt, c.tokens) for (_, prompt, _), c in zip(requests, completions, strict=True)])
    correct = [verdict.correct for verdict in verdicts]
    sums = [
        sum(correct),
        sum(len(c.tokens) for c in completions),
        sum(c.finish_reason == "length" for c in completions),
        len(completions),
    ]
    right, tokens, truncated, count = replicas.all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    metrics = {
        "accuracy": right / count,
        "length_mean": tokens / count,
        "truncated_fraction": truncated / count,
        "n": len(evaluation_set.prompts),
        "responses": int(count),
    }
    records = [
        answers.record(prompt, completion.tokens, verdict)
        for (_, prompt, k), completion, verdict in zip(requests, completions, correct, strict=True)
        if k == 0
    ]
    return metrics, records

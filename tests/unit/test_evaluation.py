"""pass@k, cons@k and intervals against brute force, and evaluations with the real engine and verifiers."""

import itertools
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_fipo.data.prompts import Prompt, read_prompts
from megatron_fipo.evaluation.accuracy import EvaluationSet, evaluate_sets
from megatron_fipo.evaluation.estimators import accuracy_interval, majority, pass_at_k, summarize
from megatron_fipo.evaluation.voting import consensus
from megatron_fipo.observe.console import Console
from megatron_fipo.observe.statistics import wilson_interval
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rewards.response import Response
from megatron_fipo.rewards.verify import answer_of
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.responder import SingleTurn


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(samples):
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(range(samples), k))
            share = sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(correct, samples, k) == pytest.approx(share, abs=1e-12)
    for k in (0, samples + 1):
        with pytest.raises(ValueError):
            pass_at_k(0, samples, k)


def test_majority_breaks_ties_evenly():
    votes = [
        (0, [], 0.0),
        (0, [3], 0.0),
        (3, [], 1.0),
        (3, [2, 2], 1.0),
        (2, [2], 0.5),
        (1, [1, 1], 1 / 3),
        (2, [3], 0.0),
    ]
    for correct, wrong, chance in votes:
        assert majority(correct, wrong) == chance


def brute_consensus(answers, correct, equal) -> float:
    """The expected vote over every order in which ties may be broken: the first class of the largest size wins."""
    classes: list[tuple[bool, list[str]]] = []
    for answer, right in zip(answers, correct, strict=True):
        if answer is None:
            continue
        for known_right, members in classes:
            if known_right and right or not (known_right or right) and any(equal(answer, m) for m in members):
                members.append(answer)
                break
        else:
            classes.append((right, [answer]))
    if not classes:
        return 0.0
    most = max(len(members) for _, members in classes)
    winners = [right for right, members in classes if len(members) == most]
    return sum(winners) / len(winners)


def test_consensus_agrees_with_brute_force():
    random_ = random.Random(4)
    same = lambda a, b: a.strip("+") == b.strip("+")  # noqa: E731
    answers, correct = [], []
    for _ in range(300):
        texts = [random_.choice([None, "1", "+1", "2", "+2", "3", "4"]) for _ in range(random_.choice([1, 4, 7]))]
        answers.append(texts)
        correct.append([t in ("1", "+1") for t in texts])
    asked = []

    def equal(triples):
        asked.extend(triples)
        return [same(a, b) for _, a, b in triples]

    expected = [brute_consensus(a, c, same) for a, c in zip(answers, correct, strict=True)]
    assert consensus(answers, correct, equal) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 3 and asked
    assert not {prompt for prompt, _, _ in asked} & {i for i, c in enumerate(correct) if not any(c)}, (
        "nothing to decide"
    )


def test_equal_answers_are_joined_by_math_verify():
    prompt = Prompt(0, (), "7", "MATH-500")
    with RewardPool(workers=1) as pool:
        answers = Answers(None, (), pool)
        pairs = [(prompt, r"\frac{1}{2}", "0.5"), (prompt, "3", "4"), (prompt, "1,000", "1000"), (prompt, "}{", "x")]
        word = Prompt(1, (), "x", "reasoning_gym/spell_backward")
        assert answers.equal([*pairs, (word, "god", "dog")]) == [True, False, True, False, False]


def test_the_interval_knows_that_responses_to_one_prompt_are_alike():
    alike = np.repeat(np.arange(40) < 10, 32).reshape(40, 32)
    assert accuracy_interval(alike) == pytest.approx(wilson_interval(0.25, 39))
    independent = np.random.default_rng(1).random((40, 32)) < 0.25
    low, high = accuracy_interval(independent)
    assert high - low < 0.4 * (lambda i: i[1] - i[0])(accuracy_interval(alike))
    assert accuracy_interval(np.zeros((30, 4), bool)) == wilson_interval(0.0, 30)
    assert accuracy_interval(np.ones((1, 4), bool)) == wilson_interval(1.0, 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random_ = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        difficulty = random_.beta(1, 1, 60)  # mean 0.5
        low, high = accuracy_interval(random_.random((60, 8)) < difficulty[:, None])
        covered += low <= 0.5 <= high
    assert 925 <= covered <= 975


def test_a_single_response_has_no_pass_or_cons():
    one = summarize(*(np.ones((3, 1), t) for t in (bool, np.int64, bool, bool)), np.ones(3))
    assert not [key for key in one if "@" in key]
    four = summarize(*(np.ones((3, 6), t) for t in (bool, np.int64, bool, bool)), np.ones(3))
    assert [key for key in four if "@" in key] == ["pass@1", "pass@2", "pass@4", "pass@6", "cons@6"]


@pytest.mark.parametrize(
    ("source", "text", "answer"),
    [
        ("aime24", "Answer: 33\n\\boxed{34}", "33"),
        ("gsm8k", "so\n#### 72", "72"),
        ("MATH-500", "Answer: 3\n\\boxed{4}", "4"),
        ("reasoning_gym/gcd", "<answer>4</answer>", "4"),
        ("reasoning_gym/gcd", "4", None),
    ],
)
def test_the_final_answer_is_the_one_that_is_judged(source, text, answer):
    assert answer_of(source, text) == answer


def test_an_evaluation_agrees_with_its_own_samples(trained_base, build_model):
    tokenizer = AutoTokenizer.from_pretrained(trained_base)
    prompts = tuple(read_prompts([str(trained_base / "heldout.jsonl")], tokenizer.encode))[:20]
    engine = EmbeddedEngine(build_model(trained_base), len(tokenizer), 64, pad_id=0)
    sampling = SamplingParams(12, 1.0, 1.0, (tokenizer.eos_token_id,))
    with RewardPool() as pool:
        answers = Answers(tokenizer, (tokenizer.eos_token_id,), pool)
        sets = [EvaluationSet("h", prompts, 6)]
        first, again = (
            evaluate_sets(SingleTurn(engine), sets, sampling, answers, Replicas.current(), 3, Console(1, enabled=False))
            for _ in range(2)
        )
        assert first == again
        records = first.records["h"]
        assert [(r["number"], r["sample"]) for r in records] == [(i, k) for i in range(20) for k in range(6)]
        by_prompt = [records[6 * i : 6 * i + 6] for i in range(20)]
        right = [sum(r["correct"] for r in group) for group in by_prompt]
        for group, prompt in zip(by_prompt, prompts, strict=True):
            texts = [Response("", r["response"], prompt.answer, prompt.source, prompt.metadata) for r in group]
            assert [v.correct for v in pool.score(texts, [0] * 6)] == [r["correct"] for r in group]
    metrics = {key.removeprefix("eval/h/"): value for key, value in first.metrics.items()}
    assert metrics["accuracy"] == pytest.approx(sum(right) / 120) and 0 < metrics["accuracy"] < 1
    assert metrics["pass@6"] == pytest.approx(sum(r > 0 for r in right) / 20)
    cons = [brute_consensus([r["final_answer"] for r in g], [r["correct"] for r in g], str.__eq__) for g in by_prompt]
    assert metrics["cons@6"] == pytest.approx(sum(cons) / 20)
    lengths = [r["tokens"] for r in records]
    assert (metrics["length_mean"], metrics["length_max"]) == (pytest.approx(np.mean(lengths)), max(lengths))
    assert 0 <= metrics["greedy_accuracy"] <= 1
    assert [e["number"] for e in first.examples] == [0, 1, 2, 3]

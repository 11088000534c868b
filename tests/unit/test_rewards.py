"""Verdicts against real reasoning-gym scorers: full credit only, failures counted, unknown sources refused."""

import subprocess
import sys

import pytest
import reasoning_gym

from megatron_fipo.errors import UserError
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rewards.response import Response, Verdict
from megatron_fipo.rewards.verify import resolve_source, rule_of, score


def respond(task: str, text: str, answer: str, metadata: dict | None = None) -> Response:
    return Response("", text, answer, f"reasoning_gym/{task}", metadata or {})


def is_correct(*args) -> bool:
    return score(respond(*args)) >= 1.0


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "spell_backward", "base_conversion", "countdown", "n_queens"])
def test_the_oracle_is_correct_and_another_problems_answer_is_not(task):
    entries = list(reasoning_gym.create_dataset(task, seed=3, size=8))
    for i, entry in enumerate(entries):
        assert is_correct(task, f"so it is <answer> {entry['answer']}\n</answer>", entry["answer"], entry["metadata"])
        other = next(e["answer"] for e in entries[i + 1 :] + entries[:i] if e["answer"] != entry["answer"])
        assert not is_correct(task, f"<answer>{other}</answer>", entry["answer"], entry["metadata"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "<answer></answer>",
        "<answer>8",
        "8</answer>",
        "<answer>eight</answer>",
        "<answer>9</answer>",
        "<answer>8<answer>8</answer>",
        "<answer>8</answer> no, <answer>9</answer>",
    ],
)
def test_what_does_not_end_in_the_right_answer_is_not_correct(text):
    assert not is_correct("chain_sum", text, "8")


def test_the_last_answer_counts():
    assert is_correct("chain_sum", "<answer>9</answer> no, <answer>8</answer>", "8")


@pytest.mark.parametrize(("task", "oracle", "answer"), [("chain_sum", "8", "18"), ("gcd", "16", "16 or so")])
def test_partial_credit_is_not_correct(task, oracle, answer):
    assert 0 < reasoning_gym.get_score_answer_fn(task)(answer, {"answer": oracle, "metadata": {}}) < 1
    with RewardPool(workers=1) as pool:
        assert pool.score([respond(task, f"<answer>{answer}</answer>", oracle)], [0]) == [Verdict(-1.0, False)]


def test_a_scorer_that_raises_is_counted():
    with RewardPool(workers=1) as pool:
        verdicts = pool.score(
            [
                respond("prime_factorization", "<answer>xx</answer>", "2 × 3"),
                respond("prime_factorization", "<answer>2 × 3</answer>", "2 × 3"),
            ],
            [0, 0],
        )
    assert (verdicts[0].reward, verdicts[0].correct) == (-1.0, False)
    assert "source: ValueError" in verdicts[0].error
    assert verdicts[1] == Verdict(1.0, True)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("reasoning_gym/chain_sums", "did you mean 'reasoning_gym/chain_sum'"),
        ("poems", "reasoning_gym/TASK"),
        ("", "--reward-default-rule"),
    ],
)
def test_an_unknown_source_is_a_user_error_with_row_and_choices(source, hint):
    with pytest.raises(UserError, match="data.jsonl, row 7") as raised:
        resolve_source(source, "data.jsonl, row 7")
    assert repr(source) in str(raised.value) and hint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_default_rule_judges_what_has_no_verifier():
    assert resolve_source("poems", default_rule="dapo") == "dapo"
    assert resolve_source("gsm8k", default_rule="dapo") == "gsm8k"
    assert score(Response("", "Answer: 5", "5", "dapo")) == score(Response("", "Answer: 5", "5", "math_verify")) == 1.0


def test_every_task_of_the_library_is_known_and_has_a_scorer():
    tasks = reasoning_gym.factory.DATASETS.keys() - {"composite"}
    assert len(tasks) > 100
    for task in tasks:
        assert rule_of(f"reasoning_gym/{task}") == "reasoning_gym"
        reasoning_gym.get_score_answer_fn(task)
    assert rule_of("reasoning_gym/composite") is None


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("math_dapo", "dapo"),
        ("BytedTsinghua-SIA/DAPO-Math-17k", "dapo"),
        ("aime24", "dapo"),
        ("AIME_2025", "dapo"),
        ("HuggingFaceH4/aime_2024", "dapo"),
        ("amc23", "math_verify"),
        ("math-ai/amc23", "math_verify"),
        ("HuggingFaceH4/MATH-500", "math_verify"),
        ("lighteval/MATH", "math_verify"),
        ("openai/gsm8k", "math_verify"),
        ("minerva_math", "math_verify"),
        ("camctl", None),
    ],
)
def test_published_source_names_find_their_rule(source, rule):
    assert rule_of(source) == rule


def test_the_verifiers_process_is_light():
    loaded = "import sys, megatron_fipo.rewards.server; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "megatron", "transformers", "numpy", "sympy", "math_verify"} & set(modules)

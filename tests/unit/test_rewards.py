"""Verdicts against real reasoning-gym scorers: full credit only, failures counted, unknown sources refused."""

import time

import pytest
import reasoning_gym

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.errors import UserError
from megatron_fipo.rewards import Verdict, check_source, verify


def a_prompt(task: str, answer: str, metadata: dict | None = None) -> Prompt:
    return Prompt(id=7, tokens=(), answer=answer, source=f"reasoning_gym/{task}", metadata=metadata or {})


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "spell_backward", "base_conversion", "countdown", "n_queens"])
def test_the_oracle_is_correct_and_another_problems_answer_is_not(task):
    entries = list(reasoning_gym.create_dataset(task, seed=3, size=8))
    for i, entry in enumerate(entries):
        prompt = a_prompt(task, entry["answer"], entry["metadata"])
        assert verify(prompt, f"so it is <answer> {entry['answer']}\n</answer>") == Verdict(True)
        other = next(e["answer"] for e in entries[i + 1 :] + entries[:i] if e["answer"] != entry["answer"])
        assert not verify(prompt, f"<answer>{other}</answer>").correct


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
    assert verify(a_prompt("chain_sum", "8"), text) == Verdict(False)


def test_the_last_answer_counts():
    assert verify(a_prompt("chain_sum", "8"), "<answer>9</answer> no, <answer>8</answer>") == Verdict(True)


@pytest.mark.parametrize(("task", "oracle", "answer"), [("chain_sum", "8", "18"), ("gcd", "16", "16 or so")])
def test_partial_credit_is_not_correct(task, oracle, answer):
    prompt = a_prompt(task, oracle)
    partial = reasoning_gym.get_score_answer_fn(task)(answer, {"answer": oracle, "metadata": {}})
    assert 0 < partial < 1
    assert verify(prompt, f"<answer>{answer}</answer>") == Verdict(False)


def test_a_scorer_that_raises_is_counted():
    verdict = verify(a_prompt("prime_factorization", "2 × 3"), "<answer>xx</answer>")
    assert not verdict.correct
    assert "prime_factorization" in verdict.error and "ValueError" in verdict.error


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("reasoning_gym/chain_sums", "did you mean 'reasoning_gym/chain_sum'"),
        ("math", "reasoning_gym/gcd"),
        ("", "gcd"),
    ],
)
def test_an_unknown_source_is_a_user_error_with_row_and_choices(source, hint):
    with pytest.raises(UserError, match="row 7") as raised:
        verify(Prompt(id=7, tokens=(), answer="1", source=source), "<answer>1</answer>")
    assert repr(source) in str(raised.value) and hint in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError):
        check_source(source)


def test_every_task_of_the_library_is_known_and_has_a_scorer():
    tasks = reasoning_gym.factory.DATASETS.keys() - {"composite"}
    assert len(tasks) > 100
    for task in tasks:
        check_source(f"reasoning_gym/{task}")
        verify(a_prompt(task, "1"), "<answer>1</answer>")
    with pytest.raises(UserError):
        check_source("reasoning_gym/composite")


def test_two_thousand_verdicts_a_second():
    prompt = a_prompt("chain_sum", "8")
    verify(prompt, "<answer>8</answer>")
    began = time.process_time()
    for _ in range(2_000):
        verify(prompt, "7+1=8;8-3=5;5-2=3<answer>3</answer>")
    assert time.process_time() - began < 1.0

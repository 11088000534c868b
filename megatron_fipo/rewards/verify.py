"""Is a response right? The prompt's ``source`` names the rule.

Rewards are binary here, as in DAPO and FIPO. Many scorers give partial credit, often for an answer that merely contains
the right one (chain_sum gives 18 half the credit where 8 is right). Counted as reward it would make contrast between
responses that are all wrong, and dynamic sampling would keep their groups. So only full credit is correct.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache

from megatron_fipo.errors import UserError
from megatron_fipo.rewards import dapo, equivalence, reasoning_gym
from megatron_fipo.rewards.final_answer import final_answer
from megatron_fipo.rewards.response import Response

_REASONING_GYM = "reasoning_gym/"

RULES: dict[str, Callable[[str, str], float]] = {"dapo": dapo.score, "math_verify": equivalence.score}
"""Rules for mathematics: (response, reference answer) -> 1.0 or 0.0."""

# Whose answers are integers first: there DAPO's rule and equivalence agree, and DAPO's is what the paper reports.
_SOURCES = (
    ("dapo", re.compile(r"dapo|(?<![a-z])aime")),
    ("math_verify", re.compile(r"math|gsm8k|(?<![a-z])amc|minerva|olympiad")),
)


@cache
def rule_of(source: str) -> str | None:
    """ "dapo", "math_verify", "reasoning_gym", or None if ``source`` has no verifier."""
    if source.startswith(_REASONING_GYM):
        return "reasoning_gym" if source.removeprefix(_REASONING_GYM) in reasoning_gym.tasks() else None
    name = source.lower()
    return next((rule for rule, pattern in _SOURCES if pattern.search(name)), None)


def score(response: Response) -> float:
    """Judge a response: 1.0 is correct, everything below is not.

    May raise anything: responses are arbitrary text, and scorers were not made for it.

    Raises:
        UserError: ``response.source`` has no verifier.
    """
    rule = rule_of(response.source)
    if rule in RULES:
        return RULES[rule](response.text, response.answer)
    resolve_source(response.source)
    answer = reasoning_gym.extract_answer(response.text)
    if answer is None:
        return 0.0
    scorer = reasoning_gym.scorer(response.source.removeprefix(_REASONING_GYM))
    return float(scorer(answer, {"answer": response.answer, "metadata": response.metadata}))


def answer_of(source: str, text: str) -> str | None:
    """The final answer that the source's verifier sees in a response."""
    rule = rule_of(source)
    if rule == "reasoning_gym":
        return reasoning_gym.extract_answer(text)
    return dapo.final_answer(text) if rule == "dapo" else final_answer(text)


def load(source: str) -> None:
    """Import what judging ``source`` needs, once."""
    rule = rule_of(source)
    if rule == "math_verify":
        equivalence.load()
    elif rule == "reasoning_gym":
        reasoning_gym.scorer(source.removeprefix(_REASONING_GYM))


def resolve_source(source: str, where: str = "prompt data", default_rule: str | None = None) -> str:
    """``source`` if it has a verifier, else ``default_rule``; ``where`` goes into the message.

    Raises:
        UserError: there is neither.
    """
    if rule_of(source) is not None:
        return source
    if default_rule is not None:
        return default_rule
    known = [_REASONING_GYM + task for task in reasoning_gym.tasks()]
    nearest = get_close_matches(source, known, n=1)
    raise UserError(
        f"{where}: no verifier for the source {source!r}; "
        + (f"did you mean {nearest[0]!r}? " if nearest else "")
        + "known are math_dapo, aime24, amc23, MATH-500, gsm8k, minerva and the like, and reasoning_gym/TASK; choose "
        "one for such rows with --reward-default-rule dapo or math_verify, or score them with --reward-function"
    )

"""Scoring by reasoning-gym's own scorers (https://github.com/open-thought/reasoning-gym).

The library is imported on first use: it takes two seconds, and runs on other data do not need it.
"""

from functools import cache, lru_cache
from typing import Any, Protocol


class Scorer(Protocol):
    """Score of an extracted answer; 1.0 is full credit. May raise on malformed answers."""

    def __call__(self, answer: str, entry: dict[str, Any]) -> float: ...


@lru_cache(maxsize=1)
def tasks() -> tuple[str, ...]:
    """The names of all tasks with a scorer, sorted.

    That is all but "composite", a mixture of other tasks: its rows are scored as the task that they come from.
    """
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(DATASETS.keys() - {"composite"}))


@cache
def scorer(task: str) -> Scorer:
    """The scorer of `task` in its default configuration. Raises ValueError for an unknown task."""
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def extract_answer(text: str) -> str | None:
    """The stripped content of the last ``<answer>...</answer>`` of `text`, None if there is none."""
    from reasoning_gym.utils import extract_answer as last_answer

    return last_answer(text)

"""What a verifier or a reward function sees, and what it says."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Response:
    """One finished response as text, with its prompt's row.

    ``truncated``: it ran into the length limit. ``metadata`` is the row's, untouched.
    """

    prompt: str
    text: str
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class Verdict:
    """``reward`` before any length penalty; ``correct`` is what accuracy and dynamic sampling count.

    ``error`` says how the verifier failed on this response (then it scored 0 and is not correct); None if it did not.
    """

    reward: float
    correct: bool
    error: str | None = None

"""Is a response right? The prompt's ``source`` names the verifier: ``reasoning_gym/<task>``.

Rewards are binary here, as in DAPO and FIPO. Many scorers give partial credit, often for an answer that merely contains
the right one (chain_sum gives 18 half the credit where 8 is right). Counted as reward it would make contrast between
responses that are all wrong, and dynamic sampling would keep their groups. So only full credit is correct.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.errors import UserError
from megatron_fipo.rewards import reasoning_gym

_REASONING_GYM = "reasoning_gym/"


@dataclass(frozen=True)
class Verdict:
    """`error` says how the scorer failed on this response (then not correct); None if it did not."""

    correct: bool
    error: str | None = None


def verify(prompt: Prompt, text: str) -> Verdict:
    """Judge the response `text` to `prompt`.

    Correct is: the last ``<answer>...</answer>``, stripped, gets full credit. A response without an answer is not
    correct. A scorer that raises makes a Verdict with `error`, for the caller to count: responses are
    arbitrary text, and one malformed answer must not end a run.

    Raises:
        UserError: `prompt.source` has no verifier.
    """
    check_source(prompt.source, prompt.id)
    answer = reasoning_gym.extract_answer(text)
    if answer is None:
        return Verdict(False)
    scorer = reasoning_gym.scorer(prompt.source.removeprefix(_REASONING_GYM))
    try:
        return Verdict(bool(scorer(answer, {"answer": prompt.answer, "metadata": prompt.metadata}) >= 1.0))
    except Exception as error:  # whatever a scorer raises on arbitrary text
        return Verdict(False, f"{prompt.source}: {type(error).__name__}: {error}")


def check_source(source: str, row: int | None = None) -> None:
    """Check that `source` has a verifier; `row` (a Prompt's id) goes into the message.

    Raises:
        UserError: it has none.
    """
    if source.startswith(_REASONING_GYM) and source.removeprefix(_REASONING_GYM) in reasoning_gym.tasks():
        return
    known = [_REASONING_GYM + task for task in reasoning_gym.tasks()]
    nearest = get_close_matches(source, known, n=1)
    raise UserError(
        f"{'prompt data' if row is None else f'prompt row {row}'}: no verifier for the source {source!r}; "
        + (f"did you mean {nearest[0]!r}? " if nearest else "")
        + f"use one of {', '.join(known)}."
    )

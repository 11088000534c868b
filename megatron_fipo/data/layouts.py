"""From a row to a question, its answer and its verifier, for the layouts in which prompts are published.

| | prompt | answer | source | metadata |
|---|---|---|---|---|
| ours | `prompt` | `answer` | `source` | `metadata` |
| verl (DAPO-Math-17k) | `prompt`, chat messages | `reward_model.ground_truth` | `data_source` | `extra_info` |
| slime | `prompt`, text or chat messages | `label` | | `metadata` |
| benchmarks | `problem` or `question` | `answer`; without it the last box of `solution` | the file's name | |
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.rewards.final_answer import last_boxed

PROMPT_KEYS = ("prompt", "problem", "question", "input")
ANSWER_KEYS = ("reward_model.ground_truth", "answer", "label", "ground_truth", "solution")
SOURCE_KEYS = ("source", "data_source")
METADATA_KEYS = ("metadata", "extra_info")

TEMPLATES = {
    "none": "{problem}",
    "dapo": "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""What goes around a bare problem; "dapo" is what stands in the prompts of DAPO-Math-17k."""

Messages = tuple[tuple[str, str], ...]
"""((role, content), ...)."""

Encode = Callable[[str | Messages], list[int]]


@dataclass(frozen=True)
class Question:
    """A row's content: text, or chat messages."""

    prompt: str | Messages
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """Columns to look at before the known ones; "a.b" is b within a.

    ``template`` goes around text that stands in another column than ``prompt``: a bare problem, without a word on how
    to answer. Its ``{problem}`` is replaced.
    """

    prompt: str | None = None
    answer: str | None = None
    template: str = "{problem}"


KNOWN_KEYS = Keys()


def parse_row(where: str, row: dict[str, Any], keys: Keys, default_source: str) -> Question:
    """Read a row. ``where`` goes into messages; ``default_source`` is for rows without a source.

    Raises:
        UserError: naming row, field, the value seen and the fix.
    """
    prompt_key, prompt = _first(row, keys.prompt, PROMPT_KEYS)
    answer_key, answer = _first(row, keys.answer, ANSWER_KEYS)
    _, source = _first(row, None, SOURCE_KEYS)
    metadata_key, metadata = _first(row, None, METADATA_KEYS)
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f"{where}: {metadata_key!r} is a {type(metadata).__name__}; make it an object or leave it out")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{where}: the source is {source!r}; make it the name of a data set, or leave it out")
    if prompt is None:
        raise UserError(f"{where}: no {_either(keys.prompt, PROMPT_KEYS)} (seen: {_seen(row)}); give --prompt-key")
    if answer is None:
        raise UserError(f"{where}: no {_either(keys.answer, ANSWER_KEYS)} (seen: {_seen(row)}); give --answer-key")
    question = _prompt(where, prompt)
    if isinstance(question, str) and prompt_key != "prompt":
        question = keys.template.replace("{problem}", question)
    return Question(question, _answer(where, answer_key, answer), source or default_source, metadata or {})


def has_key(row: dict[str, Any], key: str) -> bool:
    """Does the row have a value under ``key`` ("a.b" is b within a)?"""
    return _get(row, key) is not None


def _get(row: dict[str, Any], key: str) -> Any:
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _first(row: dict[str, Any], explicit: str | None, known: Iterable[str]) -> tuple[str, Any]:
    for key in (*filter(None, [explicit]), *known):
        if (value := _get(row, key)) is not None:
            return key, value
    return "", None


def _prompt(where: str, prompt: Any) -> str | Messages:
    if isinstance(prompt, str):
        if prompt.strip():
            return prompt
        raise UserError(f"{where}: the prompt is empty; fill it or remove the row")
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            if not (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise UserError(
                    f'{where}: the chat message {str(message)[:80]!r} is not {{"role": "user", "content": "..."}}'
                )
        return tuple((message["role"], message["content"]) for message in prompt)
    raise UserError(f"{where}: the prompt is {str(prompt)[:80]!r}; make it text or a list of chat messages")


def _answer(where: str, key: str, answer: Any) -> str:
    """Numbers as text (27.0 as 27: AMC23), GSM8K's part behind ####, a solution's last box."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    is_number = isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer))
    if is_number and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: {key!r} is {answer!r}; make it the answer as text or number")
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1]
    if key == "solution":
        answer = last_boxed(answer) or ""
    if not answer.strip():
        raise UserError(f"{where}: {key!r} holds no answer (a solution needs \\boxed{{}}); give --answer-key")
    return answer.strip()


def _either(explicit: str | None, known: tuple[str, ...]) -> str:
    names = [repr(key) for key in (*filter(None, [explicit]), *known)]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _seen(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:12])) or "an empty object"

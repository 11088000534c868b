"""Prompts: reading, checking, and the endless shuffled stream that training draws from."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A tokenised question with what its verifier needs.

    ``id`` is the row's number over all files, ``source`` selects the verifier, ``metadata`` goes to it untouched.
    """

    id: int
    tokens: tuple[int, ...]
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(paths: Sequence[str], encode: Callable[[str], list[int]]) -> list[Prompt]:
    """Read JSONL files with rows ``{"prompt", "answer", "source", "metadata"}``.

    Raises UserError naming file and row for anything that is not such a row.
    """
    prompts: list[Prompt] = []
    for path in paths:
        for where, row in _rows(path):
            for key in ("prompt", "answer", "source"):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise UserError(
                        f"{where}: the field '{key}' is missing, empty or not a string (seen: {row.get(key)!r}); "
                        f'each row needs {{"prompt": ..., "answer": ..., "source": ...}}'
                    )
            metadata = row.get("metadata", {})
            if not isinstance(metadata, dict):
                raise UserError(
                    f"{where}: 'metadata' is a {type(metadata).__name__}; make it an object or leave it out"
                )
            tokens = tuple(encode(row["prompt"]))
            prompts.append(Prompt(len(prompts), tokens, row["answer"], row["source"], metadata))
    if not prompts:
        raise UserError(f"no prompt in {', '.join(paths)}: give at least one row")
    return prompts


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not Path(path).is_file():
        raise UserError(f"prompt file {path} does not exist; give an existing JSONL file")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                row = json.loads(line)  # UTF-8, as JSON asks
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not JSON ({error}); write one JSON object per line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON {type(row).__name__}; write one JSON object per line")
            yield where, row


def drop_long(prompts: Sequence[Prompt], max_tokens: int) -> list[Prompt]:
    """The prompts of at most ``max_tokens`` tokens. Raises UserError if none is left."""
    kept = [p for p in prompts if len(p.tokens) <= max_tokens]
    if not kept:
        shortest = min(len(p.tokens) for p in prompts)
        raise UserError(
            f"--max-prompt-tokens {max_tokens} drops every prompt (the shortest has {shortest} tokens); raise it"
        )
    return kept


class PromptStream:
    """Every prompt once per epoch, each epoch in an order of its own that only the seed and the epoch decide.

    ``cursor`` counts the prompts handed out since training began; it is the whole state of the stream.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, cursor: int = 0):
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def fingerprint(self) -> str:
        """Equal for streams that hand out the same prompts at the same cursor."""
        digest = hashlib.sha256(str(self.seed).encode())
        for prompt in self.prompts:
            digest.update(repr((prompt.tokens, prompt.answer, prompt.source)).encode())
        return digest.hexdigest()[:16]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` prompts as (visit, prompt); a visit's number is never given twice."""
        visits = range(self.cursor, self.cursor + count)
        self.cursor += count
        return [(v, self.prompts[self._order(v // len(self.prompts))[v % len(self.prompts)]]) for v in visits]

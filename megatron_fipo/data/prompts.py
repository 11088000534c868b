"""Prompts: reading, checking, and the endless shuffled stream that training draws from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_fipo.data.layouts import KNOWN_KEYS, Encode, Keys, Messages, has_key, parse_row
from megatron_fipo.data.sources import decode, find_files, read_rows, source_name
from megatron_fipo.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised question with what its verifier needs.

    ``id`` is the row's number over all files (of equal rows the first's), ``source`` selects the verifier, ``metadata``
    goes to it untouched, ``part`` is the number of the path that it was read from.
    """

    id: int
    tokens: tuple[int, ...]
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    part: int = 0


Resolve = Callable[[str, str], str]
"""(source, file and row) -> the source whose verifier judges the row; raises UserError if there is none."""


def read_prompts(
    paths: Sequence[str],
    encode: Encode,
    keys: Keys = KNOWN_KEYS,
    resolve: Resolve = lambda source, where: source,
    *,
    keys_may_be_absent: bool = False,
) -> list[Prompt]:
    """Read files, folders or Hub datasets (sources.py) of any known layout (layouts.py).

    A row without a source has its file's name for one. Rows of a path that are equal in all that a prompt holds stand
    there as often as in the file, but are one object.
    Raises UserError naming file and row for anything that is no such row, and for a key that no row has, unless
    ``keys_may_be_absent``.
    """
    prompts: list[Prompt] = []
    distinct: dict[tuple[Any, ...], Prompt] = {}  # published data repeats rows a hundred times
    encoded: dict[str | Messages, tuple[int, ...]] = {}
    unseen = {flag: key for flag, key in (("--prompt-key", keys.prompt), ("--answer-key", keys.answer)) if key}
    for part, spec in enumerate(paths):
        default_source = source_name(spec)
        for where, raw in (row for path in find_files(spec) for row in read_rows(path)):
            row = decode(where, raw)
            question = parse_row(where, row, keys, default_source)
            unseen = {flag: key for flag, key in unseen.items() if not has_key(row, key)}
            source = resolve(question.source, where)
            content = (question.prompt, question.answer, source, repr(question.metadata), part)
            if content not in distinct:
                if question.prompt not in encoded:
                    encoded[question.prompt] = tuple(encode(question.prompt))
                tokens = encoded[question.prompt]
                distinct[content] = Prompt(len(prompts), tokens, question.answer, source, question.metadata, part)
            prompts.append(distinct[content])
    if not prompts:
        raise UserError(f"no prompt in {', '.join(paths)}: give at least one row")
    for flag, key in unseen.items():
        if not keys_may_be_absent:
            raise UserError(f"{flag} {key!r} is in no row of {', '.join(paths)}; check its spelling")
    return prompts


def drop_long(prompts: Sequence[Prompt], max_tokens: int) -> list[Prompt]:
    """The prompts of at most ``max_tokens`` tokens. Raises UserError if none is left."""
    kept = [p for p in prompts if len(p.tokens) <= max_tokens]
    if not kept:
        shortest = min(len(p.tokens) for p in prompts)
        raise UserError(
            f"--max-prompt-tokens {max_tokens} drops every prompt (the shortest has {shortest} tokens); raise it"
        )
    return kept


def count_duplicates(prompts: Sequence[Prompt]) -> int:
    """Prompts whose tokens an earlier one has."""
    return len(prompts) - len({prompt.tokens for prompt in prompts})


class PromptStream:
    """Every prompt once per epoch, each epoch in an order of its own that only the seed and the epoch decide.

    With ``weights``, one for each part, an epoch has as many prompts, but each part has its weight's share of them, in
    its own order, which goes on from epoch to epoch.

    ``cursor`` counts the prompts handed out since training began; it is the whole state of the stream.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, cursor: int = 0, weights: Sequence[float] = ()):
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor
        self._weights = tuple(weights)
        self._parts = [np.flatnonzero([p.part == part for p in prompts]) for part in range(len(weights))]
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def fingerprint(self) -> str:
        """Equal for streams that hand out the same prompts at the same cursor."""
        digest = hashlib.sha256(str(self.seed).encode())
        content = lru_cache(maxsize=1 << 15)(lambda *fields: repr(fields).encode())  # repr takes long, rows repeat
        for prompt in self.prompts:
            digest.update(content(prompt.tokens, prompt.answer, prompt.source))
        if self._weights:
            digest.update(repr((self._weights, [len(part) for part in self._parts])).encode())
        return digest.hexdigest()[:16]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The places of the epoch's prompts, int64 [prompts]."""
        random = np.random.default_rng([self.seed, epoch])
        if not self._weights:
            return random.permutation(len(self.prompts))
        quotas = _quotas(len(self.prompts), self._weights)
        drawn = [self._drawn(part, epoch * quota, quota) for part, quota in enumerate(quotas)]
        return random.permutation(np.concatenate(drawn))

    def _drawn(self, part: int, start: int, count: int) -> np.ndarray:
        """Places ``start`` to ``start + count`` of a part's own endless order."""
        members, slices = self._parts[part], []
        while count:
            round_, offset = divmod(start, len(members))
            order = members[np.random.default_rng([self.seed, part, round_]).permutation(len(members))]
            slices.append(order[offset : offset + count])
            start, count = start + len(slices[-1]), count - len(slices[-1])
        return np.concatenate(slices or [members[:0]])

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` prompts as (visit, prompt); a visit's number is never given twice."""
        visits = range(self.cursor, self.cursor + count)
        self.cursor += count
        return [(v, self.prompts[self._order(v // len(self.prompts))[v % len(self.prompts)]]) for v in visits]


def _quotas(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` shared out by weight, rounded by largest remainder."""
    exact = np.array(weights) / sum(weights) * total
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas.tolist()

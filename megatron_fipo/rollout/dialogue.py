"""What a user's rollout function works with: the response to one prompt, written in turns by the model and by tools."""

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.rollout.engine import Completion, SamplingParams

PIECE_TOKENS = 256  # engines know stop tokens only: what may end at a string is generated in pieces, and cut


@dataclass(frozen=True)
class Request:
    """``tokens``, the prompt's included, to be continued by at most ``limit`` tokens from place ``start`` of the
    response on, whose seed is ``seed``."""

    tokens: tuple[int, ...]
    seed: int
    start: int
    limit: int


@dataclass(frozen=True)
class Turn:
    """What the model has just written.

    ``text`` is decoded with special tokens kept. ``finish_reason``: "stop" (it ended with a stop token), "string" (it
    ends with the token that completed one of the strings asked for), "length" (a limit).
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str


class Dialogue:
    """One response in the making. Tokens are only ever added to it, so that it is one sequence to train on.

    The model's tokens, with the log-probs under which they were drawn, are in the loss; inserted ones are not.
    """

    def __init__(
        self,
        prompt: Prompt,
        seed: int,
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ):
        """``seed`` is the response's; ``sampling.max_tokens`` bounds all of it, inserted tokens included."""
        self.prompt = prompt
        self._seed, self._sampling = seed, sampling
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tokens: list[int] = []
        self._logp: list[float] = []
        self._mask: list[bool] = []
        self.ask: Callable[[Request], Awaitable[Completion]]  # set by who runs it; may give fewer tokens than asked for
        self._told_that_it_is_full = False
        self.generating = False

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._sampling.max_tokens - len(self._tokens)

    @property
    def text(self) -> str:
        """The response so far, special tokens kept."""
        return self._tokenizer.decode(self._tokens, skip_special_tokens=False)

    async def generate(self, max_tokens: int | None = None, stop: str | Sequence[str] = ()) -> Turn:
        """Let the model go on until a stop token, a string in ``stop``, ``max_tokens`` or the response's limit.

        Once the response is full, the turn is empty and its finish_reason "length".
        Raises RuntimeError if asked again then, or while another call waits; ValueError for ``max_tokens`` below 1 and
        for an empty string.
        """
        strings = (stop,) if isinstance(stop, str) else stop
        if self.generating:
            raise RuntimeError("generate() was called while another call for the same response waits; await it first")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"generate(max_tokens={max_tokens}): ask for at least 1")
        if not all(strings):
            raise ValueError(f"generate(stop={stop!r}): an empty string ends nothing")
        if self._told_that_it_is_full:
            raise RuntimeError("the response is full: return once a turn's finish_reason is 'length'")
        limit = self.room if max_tokens is None else min(max_tokens, self.room)
        self._told_that_it_is_full = limit == 0
        self.generating = True
        try:
            return await self._turn(limit, strings)
        finally:
            self.generating = False

    def insert(self, content: str | Sequence[int]) -> None:
        """Add what a tool or another speaker says, as text or token ids; what does not fit into the response is cut.

        Raises ValueError for ids outside the vocabulary, RuntimeError while the model writes.
        """
        if self.generating:
            raise RuntimeError("insert() was called while generate() waits; await it first")
        is_text = isinstance(content, str)
        tokens = self._tokenizer.encode(content, add_special_tokens=False) if is_text else [*map(int, content)]
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"insert(): token id {token} is outside the vocabulary of {self._vocab_size}")
        tokens = tokens[: self.room]
        self._add(tokens, [0.0] * len(tokens), generated=False)

    def completion(self) -> Completion:
        """The response as it stands. Raises ValueError if the model wrote none of it."""
        if not any(self._mask):
            raise ValueError("it ended before the model had written a token; await generate() at least once")
        stopped = self._mask[-1] and self._tokens[-1] in self._sampling.stop_token_ids
        finish_reason = "stop" if stopped or self.room else "length"
        return Completion(tuple(self._tokens), tuple(self._logp), finish_reason, tuple(self._mask))

    async def _turn(self, limit: int, stop: Sequence[str]) -> Turn:
        start, finish_reason = len(self._tokens), "length"
        while finish_reason == "length" and (left := start + limit - len(self._tokens)):
            known = len(self._tokens)
            context = (*self.prompt.tokens, *self._tokens)
            limit_of_piece = min(left, PIECE_TOKENS) if stop else left
            completion = await self.ask(Request(context, self._seed, known, limit_of_piece))
            self._add(completion.tokens, completion.logp, generated=True)
            finish_reason = completion.finish_reason
            if (end := self._end_of(stop, start, known)) is not None:
                del self._tokens[end:], self._logp[end:], self._mask[end:]
                finish_reason = "string"
        tokens = tuple(self._tokens[start:])
        return Turn(self._tokenizer.decode(tokens, skip_special_tokens=False), tokens, finish_reason)

    def _end_of(self, stop: Sequence[str], start: int, known: int) -> int | None:
        """Tokens up to the first one that completes one of ``stop`` in the turn from ``start`` on; up to ``known`` it
        is known that none does."""
        if not stop:
            return None
        begin = max(start, known - 4 * max(map(len, stop)))  # a token holds at least a byte, a character at most four

        def completed(end: int) -> bool:
            text = self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=False)
            return any(string in text for string in stop)

        ends = range(known + 1, len(self._tokens) + 1)
        place = bisect_left(ends, True, key=completed)
        return ends[place] if place < len(ends) else None

    def _add(self, tokens: Sequence[int], logp: Sequence[float], *, generated: bool) -> None:
        self._tokens += tokens
        self._logp += logp
        self._mask += [generated] * len(tokens)

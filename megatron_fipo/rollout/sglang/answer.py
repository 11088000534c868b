"""What a server is asked for one completion, and whether its answer is one: a wrong token must never enter a batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.rollout.engine import Completion, SamplingParams
from megatron_fipo.rollout.sglang.server import MalformedAnswer, ServerLost, ServerRefused

TOKENS_PER_EVENT = 32
"""Tokens between two signs of life of one request (the first token is one at once)."""


@dataclass(frozen=True)
class Question:
    """One completion to ask for; ``rid`` names it on the server."""

    rid: str
    prompt: tuple[int, ...]
    seed: int
    sampling: SamplingParams

    def body(self) -> dict[str, Any]:
        """The JSON of /generate. Everything that shapes the distribution is said: a server's defaults may differ.

        The seed counts under --enable-deterministic-inference only; other servers ignore it.
        """
        sampling = self.sampling
        return {
            "rid": self.rid,
            "input_ids": self.prompt,
            "stream": True,
            "return_logprob": True,
            "logprob_start_len": -1,
            "sampling_params": {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sampling.stop_token_ids,
                "sampling_seed": self.seed,
                "stream_interval": TOKENS_PER_EVENT,
            },
        }


@dataclass
class Answer:
    """Collects the events of one answer. SGLang sends what is new in each, and everything about the whole in the last.

    Its log-probs are those of logits / temperature (temperature 0: of the logits), before top-p.
    """

    question: Question
    vocab_size: int
    version: str
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    last: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take one event; True if it was the last.

        Raises ServerRefused (an error instead of tokens), ServerLost (aborted by the server), MalformedAnswer.
        """
        if "error" in event:
            error = event["error"] if isinstance(event["error"], Mapping) else {"message": event["error"]}
            raise ServerRefused(int(error.get("code") or 500), str(error.get("message")))
        try:
            meta = event["meta_info"]
            tokens, scored = event["output_ids"], meta["output_token_logprobs"]
            logp = [float(entry[0]) for entry in scored]
            rid, prompt_tokens, reason = meta["id"], meta["prompt_tokens"], meta["finish_reason"]
            if reason is not None and reason["type"] == "abort":
                raise ServerLost(f"aborted by the server: {reason.get('message')}")
            same = tokens == [entry[1] for entry in scored]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise MalformedAnswer(f"not an event of /generate ({error!r}): {str(event)[:200]}") from error
        if rid != self.question.rid or prompt_tokens != len(self.question.prompt):
            raise MalformedAnswer(f"the answer to another request: {rid}, {prompt_tokens} prompt tokens")
        if not same:
            raise MalformedAnswer(f"log-probs of other tokens: {tokens[:8]}... and {scored[:8]}...")
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in tokens):
            raise MalformedAnswer(f"tokens outside the vocabulary of {self.vocab_size}: {tokens[:8]}...")
        if not all(math.isfinite(value) and value < 1e-3 for value in logp):
            raise MalformedAnswer(f"log-probs that are none: {logp[:8]}...")
        self.tokens += tokens
        self.logp += logp
        self.last = event if reason is not None else None
        return reason is not None

    def completion(self) -> Completion:
        """The whole answer. Raises MalformedAnswer."""
        sampling, count = self.question.sampling, len(self.tokens)
        if self.last is None:
            raise MalformedAnswer(f"no finish after {count} tokens")
        meta = self.last["meta_info"]
        spans = meta.get("weight_versions") or [{"version": meta.get("weight_version")}]
        if any(str(span.get("version")) != self.version for span in spans):
            raise MalformedAnswer(f"tokens of weights {spans}, not of version {self.version}")
        stopped = meta["finish_reason"]["type"] == "stop"
        ends_with_stop = count > 0 and self.tokens[-1] in sampling.stop_token_ids
        if count == 0 or meta.get("completion_tokens") != count or count > sampling.max_tokens:
            raise MalformedAnswer(
                f"{count} tokens, said to be {meta.get('completion_tokens')} of {sampling.max_tokens}"
            )
        if stopped != ends_with_stop or (not stopped and count != sampling.max_tokens):
            raise MalformedAnswer(f"{meta['finish_reason']} after {count} tokens that end with {self.tokens[-1]}")
        if any(token in sampling.stop_token_ids for token in self.tokens[:-1]):
            raise MalformedAnswer("tokens behind a stop token")
        return Completion(tuple(self.tokens), tuple(self.logp), "stop" if stopped else "length")

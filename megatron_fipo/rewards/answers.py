"""Token ids to text to verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rewards.response import Response, Verdict
from megatron_fipo.rewards.verify import RULES, answer_of, rule_of
from megatron_fipo.rollout.engine import Completion


@dataclass(frozen=True)
class Answers:
    """Reads responses with the model's tokenizer; a response may end with one of ``stop_token_ids``."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    pool: RewardPool

    def text(self, tokens: Sequence[int]) -> str:
        """The response as its verifier sees it: special tokens kept (tags may be among them), the stop token cut."""
        return self.tokenizer.decode(tokens[: len(tokens) - self._stopped(tokens)], skip_special_tokens=False)

    def verify(self, responses: Sequence[tuple[Prompt, Completion]]) -> list[Verdict]:
        """Judge (prompt, response) pairs; neighbours with the same prompt form a group."""
        groups: list[int] = []
        for i, (prompt, _) in enumerate(responses):
            same = i > 0 and prompt is responses[i - 1][0]
            groups.append(groups[-1] if same else len(groups))
        texts = [
            Response(
                prompt=self.text(prompt.tokens),
                text=self.text(completion.tokens),
                answer=prompt.answer,
                source=prompt.source,
                metadata=prompt.metadata,
                truncated=completion.finish_reason == "length",
            )
            for prompt, completion in responses
        ]
        return self.pool.score(texts, groups)

    def final_answer(self, prompt: Prompt, tokens: Sequence[int]) -> str | None:
        """What the response's verifier takes for its final answer."""
        return answer_of(prompt.source, self.text(tokens))

    def equal(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[bool]:
        """Are two final answers to a prompt of mathematics equal? For other prompts, of other text, they are not."""
        equal = [False] * len(pairs)
        mathematical = [i for i, (prompt, _, _) in enumerate(pairs) if rule_of(prompt.source) in RULES]
        for i, same in zip(mathematical, self.pool.equal([pairs[i][1:] for i in mathematical]), strict=True):
            equal[i] = same
        return equal

    def record(self, prompt: Prompt, response: Sequence[int], correct: bool) -> dict[str, Any]:
        """A response as samples.jsonl holds it."""
        return {
            "prompt": self.text(prompt.tokens),
            "response": self.text(response),
            "answer": prompt.answer,
            "correct": correct,
        }

    def _stopped(self, tokens: Sequence[int]) -> bool:
        return len(tokens) > 0 and tokens[-1] in self.stop_token_ids

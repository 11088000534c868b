"""Token ids to text to verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.rewards.verify import verify


@dataclass(frozen=True)
class Answers:
    """Reads responses with the model's tokenizer; a response may end with one of ``stop_token_ids``."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]

    def text(self, tokens: Sequence[int]) -> str:
        """The response as its verifier sees it: special tokens kept (tags may be among them), the stop token cut."""
        stopped = len(tokens) > 0 and tokens[-1] in self.stop_token_ids
        return self.tokenizer.decode(tokens[: len(tokens) - stopped], skip_special_tokens=False)

    def verify(self, prompt: Prompt, tokens: Sequence[int]) -> tuple[bool, bool]:
        """(correct, the verifier failed)."""
        verdict = verify(prompt, self.text(tokens))
        return verdict.correct, verdict.error is not None

    def record(self, prompt: Prompt, response: Sequence[int], correct: bool) -> dict[str, str | bool]:
        """A response as samples.jsonl holds it."""
        return {
            "prompt": self.text(prompt.tokens),
            "response": self.text(response),
            "answer": prompt.answer,
            "correct": correct,
        }

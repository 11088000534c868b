"""What a run reads - tokenizer, prompts, evaluation sets - checked before any process group exists."""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_fipo.data.prompts import Prompt, drop_long, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.evaluation.accuracy import EvaluationSet
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.verify import check_source
from megatron_fipo.validation import parse_eval_data


@dataclass(frozen=True)
class Inputs:
    """Prompts are those of at most --max-prompt-tokens; ``dropped_prompts`` were longer."""

    answers: Answers
    prompts: list[Prompt]
    dropped_prompts: int
    eval_sets: tuple[EvaluationSet, ...]

    def counts(self) -> dict[str, int]:
        """For --dry-run."""
        return {
            "prompts": len(self.prompts),
            "dropped_prompts": self.dropped_prompts,
            "eval_prompts": sum(len(s.prompts) for s in self.eval_sets),
        }

    def __str__(self) -> str:
        n = self.counts()
        dropped = f" ({n['dropped_prompts']:,} too long)" if n["dropped_prompts"] else ""
        return f"{n['prompts']:,}{dropped}, held out {n['eval_prompts']:,}"


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read everything. Raises UserError naming file and row."""
    tokenizer = _tokenizer(args.hf_model)
    encode = functools.partial(tokenizer.encode, add_special_tokens=True)

    def read(paths: Sequence[str]) -> list[Prompt]:
        prompts = read_prompts(paths, encode)
        for source in sorted({p.source for p in prompts}):
            check_source(source)
        return prompts

    prompts = read(args.prompt_data) if args.prompt_data else []
    kept = drop_long(prompts, args.max_prompt_tokens) if prompts else []
    return Inputs(
        answers=Answers(tokenizer, _stop_token_ids(args.hf_model, tokenizer)),
        prompts=kept,
        dropped_prompts=len(prompts) - len(kept),
        eval_sets=tuple(
            EvaluationSet(name, tuple(drop_long(read([path]), args.max_prompt_tokens)), samples)
            for name, path, samples in map(parse_eval_data, args.eval_data)
        ),
    )


def _tokenizer(hf_model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(hf_model, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise UserError(
            f"--hf-model {hf_model}: the tokenizer cannot be read ({error}); copy its files again"
        ) from error


def _stop_token_ids(hf_model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end of sequence and those that the model's files list (chat models end a turn with another).

    An SGLang server stops at all of them, whether it is told to or not.
    """
    ids = {tokenizer.eos_token_id}
    for file in (Path(hf_model) / name for name in ("generation_config.json", "config.json")):
        listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        ids |= set(listed if isinstance(listed, list) else [listed])
    ids -= {None}
    if not ids:
        raise UserError(
            f"--hf-model {hf_model} names no end-of-sequence token, so every response would run to its limit; "
            f"set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return tuple(sorted(ids))

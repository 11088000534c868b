"""What a run reads - tokenizer, prompts, evaluation sets - checked before any process group exists."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.encoding import encoder, load_tokenizer
from megatron_fipo.data.layouts import TEMPLATES, Keys
from megatron_fipo.data.prompts import Prompt, count_duplicates, drop_long, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.evaluation.accuracy import EvaluationSet
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.functions import SOURCE, parse_terms
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rewards.verify import resolve_source
from megatron_fipo.rollout.functions import RolloutFunction
from megatron_fipo.validation import model_parallel_size, parse_eval_data


@dataclass(frozen=True)
class Inputs:
    """Prompts are those of at most --max-prompt-tokens; ``dropped_prompts`` were longer.

    ``duplicate_prompts`` have the tokens of an earlier one; they are trained on as often as they stand there.
    """

    answers: Answers
    prompts: list[Prompt]
    dropped_prompts: int
    duplicate_prompts: int
    eval_sets: tuple[EvaluationSet, ...]
    rollout_function: RolloutFunction | None

    def counts(self) -> dict[str, int]:
        """For --dry-run."""
        return {
            "prompts": len(self.prompts),
            "dropped_prompts": self.dropped_prompts,
            "duplicate_prompts": self.duplicate_prompts,
            "eval_prompts": sum(len(s.prompts) for s in self.eval_sets),
        }

    def __str__(self) -> str:
        n = self.counts()
        notes = [f"{n['dropped_prompts']:,} too long"] if n["dropped_prompts"] else []
        notes += [f"{n['duplicate_prompts']:,} duplicates"] if n["duplicate_prompts"] else []
        return f"{n['prompts']:,}{f' ({", ".join(notes)})' if notes else ''}, held out {n['eval_prompts']:,}"


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read everything, and start the verifiers' process. Raises UserError naming file and row."""
    tokenizer = load_tokenizer(args.hf_model)
    encode = encoder(tokenizer, args.apply_chat_template)
    terms = parse_terms(args.reward_function)
    function = RolloutFunction.load(args.rollout_function) if args.rollout_function else None
    keys = Keys(args.prompt_key, args.answer_key, TEMPLATES.get(args.problem_template, args.problem_template))

    def resolve(source: str, where: str) -> str:
        needed = any(term.name == SOURCE for term in terms)
        return resolve_source(source, where, args.reward_default_rule) if needed else source

    prompts = read_prompts(args.prompt_data, encode, keys, resolve) if args.prompt_data else []
    kept = drop_long(prompts, args.max_prompt_tokens) if prompts else []
    _check_weights(args, kept)
    eval_sets = []
    for name, path, samples in map(parse_eval_data, args.eval_data):
        held_out = read_prompts([path], encode, keys, resolve, keys_may_be_absent=bool(args.prompt_data))
        eval_sets.append(EvaluationSet(name, tuple(drop_long(held_out, args.max_prompt_tokens)), samples))
    leaders = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // model_parallel_size(args))  # on this node
    workers = max(1, len(os.sched_getaffinity(0)) // leaders)
    pool = RewardPool(
        terms,
        workers=workers,
        timeout=args.reward_timeout,
        network=args.reward_network,
        sources={p.source for p in (*kept, *(p for s in eval_sets for p in s.prompts))},
    )
    return Inputs(
        answers=Answers(tokenizer, _stop_token_ids(args.hf_model, tokenizer), pool),
        prompts=kept,
        dropped_prompts=len(prompts) - len(kept),
        duplicate_prompts=count_duplicates(kept),
        eval_sets=tuple(eval_sets),
        rollout_function=function,
    )


def _check_weights(args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    left = {prompt.part for prompt in prompts}
    for part, (path, weight) in enumerate(zip(args.prompt_data or (), args.prompt_weights, strict=False)):
        if weight > 0 and part not in left:
            raise UserError(
                f"--prompt-weights gives {path} {weight:g}, but no prompt of it has at most --max-prompt-tokens "
                f"{args.max_prompt_tokens}; raise it, or set the weight to 0"
            )


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

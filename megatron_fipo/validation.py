"""Everything about a command line that can be known to be wrong before anything starts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.errors import UserError

_REFUSED = {
    "--perform-rl-step": "megatron_fipo runs its own loop; leave it out",
    "--grpo-filter-groups-with-same-reward": "use --rollout-dynamic-sampling",
    "--train-iters": "use --num-steps (one step is one rollout with all its updates)",
    "--train-samples": "use --num-steps (one step is one rollout with all its updates)",
    "--micro-batch-size": "micro-batches are packs; use --max-tokens-per-microbatch",
    "--seq-length": "it follows from --max-prompt-tokens and --rollout-max-tokens",
    "--save": "checkpoints go to RUNS_DIR/RUN_NAME/checkpoints; use --runs-dir and --run-name",
    "--tokenizer-type": "the tokenizer comes from --hf-model",
    "--tokenizer-model": "the tokenizer comes from --hf-model",
}
_PRETRAINING_DATA = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
    "--mock-data",
    "--sft",
    "--eval-iters",
    "--split",
)


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse Megatron flags that would be ignored. Raises UserError naming the flag and what to use instead."""
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag in _REFUSED:
            raise UserError(f"{flag} is not used here: {_REFUSED[flag]}")
        if flag in _PRETRAINING_DATA:
            raise UserError(f"{flag} is for pre-training; give prompts with --prompt-data")
        if flag.startswith("--rl-"):
            raise UserError(f"{flag} belongs to megatron.rl and is not honoured; see --help for --rollout-* flags")


def check(args: argparse.Namespace) -> None:
    """Check parsed arguments. Raises UserError naming the flag, the value seen and the fix."""
    _check_batch(args)
    _check_algorithm(args)
    _check_parallel(args)
    if args.dry_run and not args.hf_model and not args.prompt_data:
        return  # a preset's arithmetic needs no model
    if not args.hf_model:
        raise UserError("--hf-model is missing: give the Hugging Face folder of the model to train")
    if not args.prompt_data and not args.train_from_rollouts:
        raise UserError("--prompt-data is missing: give at least one JSONL file of prompts")
    for spec in args.eval_data:
        parse_eval_data(spec)
    if args.rollout_only and args.train_from_rollouts:
        raise UserError("--rollout-only and --train-from-rollouts exclude each other: run one after the other")
    if args.train_from_rollouts and not Path(args.train_from_rollouts).is_dir():
        raise UserError(
            f"--train-from-rollouts {args.train_from_rollouts} is no folder; give what --rollout-only wrote"
        )
    for flag, folder in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder} is no folder; give the checkpoints folder of a run")
    run = Path(args.runs_dir) / args.run_name
    if not args.load and not args.dry_run and (run / "checkpoints").exists():
        raise UserError(
            f"{run} already holds checkpoints; continue it with --load {run / 'checkpoints'} "
            f"or choose another --run-name"
        )


def parse_eval_data(spec: str) -> tuple[str, str, int]:
    """Split ``NAME:PATH:N`` into its parts. Raises UserError."""
    name, _, rest = spec.partition(":")
    path, _, count = rest.rpartition(":")
    if not name or not path or not count.isdigit() or int(count) < 1:
        raise UserError(f"--eval-data {spec!r} is not NAME:PATH:N, for example aime24:data/aime24.jsonl:32")
    return name, path, int(count)


def _check_batch(args: argparse.Namespace) -> None:
    group, prompts, update = args.grpo_group_size, args.grpo_prompts_per_step, args.global_batch_size
    if group < 2:
        raise UserError(f"--grpo-group-size {group}: an advantage is relative to its group; use at least 2")
    for flag in ("grpo_prompts_per_step", "num_steps", "rollout_max_tokens", "max_prompt_tokens", "grpo_iterations"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    samples = prompts * group
    if update % group:
        raise UserError(
            f"--global-batch-size {update} is no multiple of --grpo-group-size {group}: an update holds whole groups; "
            f"use {max(1, update // group) * group}"
        )
    if samples % update:
        fits = max(u for u in range(group, min(update, samples) + 1, group) if samples % u == 0)
        raise UserError(
            f"--global-batch-size {update} does not divide the rollout of {prompts} x {group} = {samples} samples; "
            f"use {fits}"
        )
    updates = samples // update * args.grpo_iterations
    if args.loss == "fipo" and updates < 2 and not args.allow_inactive_fipo:
        raise UserError(
            f"one update per rollout ({samples} samples, --global-batch-size {update}) makes every influence weight 1 "
            f"and FIPO equal to DAPO; lower --global-batch-size to at most {samples // 2 // group * group} "
            f"or pass --allow-inactive-fipo"
        )
    replicas = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    if replicas and update % replicas:
        raise UserError(
            f"--global-batch-size {update} does not divide over {replicas} data-parallel replicas; "
            f"use a multiple of {replicas}"
        )


def _check_algorithm(args: argparse.Namespace) -> None:
    if args.grpo_kl_beta or args.grpo_entropy_term_weight:
        raise UserError("--grpo-kl-beta and --grpo-entropy-term-weight are not supported yet; leave them at 0")
    if args.fipo_half_life <= 0:
        raise UserError(f"--fipo-half-life {args.fipo_half_life} must be positive (tokens)")
    if not 0 <= args.fipo_weight_low <= 1 <= args.fipo_weight_high:
        raise UserError(
            f"--fipo-weight-low {args.fipo_weight_low} and --fipo-weight-high {args.fipo_weight_high} must enclose 1"
        )
    if args.rollout_temperature <= 0:
        raise UserError(
            f"--rollout-temperature {args.rollout_temperature} must be positive; greedy rollouts have no contrast"
        )
    if not 0 < args.eval_top_p <= 1:
        raise UserError(f"--eval-top-p {args.eval_top_p} must be in (0, 1]")
    if not 0 <= args.reward_overlong_buffer < args.rollout_max_tokens:
        raise UserError(
            f"--reward-overlong-buffer {args.reward_overlong_buffer} must be less than "
            f"--rollout-max-tokens {args.rollout_max_tokens}"
        )


def _check_parallel(args: argparse.Namespace) -> None:
    for flag in ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"):
        if getattr(args, flag) != 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not supported yet; leave it at 1")
    if args.sequence_parallel:
        raise UserError("--sequence-parallel is not supported yet; leave it out")
    tensor = args.tensor_model_parallel_size
    heads = args.num_attention_heads
    if heads and heads % tensor:
        fits = [t for t in range(1, heads + 1) if heads % t == 0]
        raise UserError(
            f"--tensor-model-parallel-size {tensor} does not divide the model's {heads} attention heads; "
            f"use one of {fits}"
        )
    if args.world_size % tensor:
        raise UserError(
            f"{args.world_size} ranks cannot hold --tensor-model-parallel-size {tensor}; start a multiple of it"
        )

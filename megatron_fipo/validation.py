"""Everything about a command line that can be known to be wrong before anything starts."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.checkpoint.state import check_loadable
from megatron_fipo.errors import UserError
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.rewards.functions import parse_terms
from megatron_fipo.settings import loss_config

_REFUSED = {
    "--perform-rl-step": "megatron_fipo runs its own loop; leave it out",
    "--grpo-filter-groups-with-same-reward": "use --rollout-dynamic-sampling",
    "--train-iters": "use --num-steps (one step is one rollout with all its updates)",
    "--train-samples": "use --num-steps (one step is one rollout with all its updates)",
    "--micro-batch-size": "micro-batches are packs; use --max-tokens-per-microbatch",
    "--seq-length": "it follows from --max-prompt-tokens and --rollout-max-tokens",
    "--save": "checkpoints go to RUNS_DIR/RUN_NAME/checkpoints; use --runs-dir and --run-name",
    "--async-save": "checkpoints are written synchronously; leave it out",
    "--ckpt-step": "--load takes the newest whole checkpoint; remove newer ones to go further back",
    "--pretrained-checkpoint": "use --load DIR --finetune",
    "--tokenizer-type": "the tokenizer comes from --hf-model",
    "--tokenizer-model": "the tokenizer comes from --hf-model",
    "--fp16": "use --bf16, which needs no loss scaling",
    "--sequence-parallel": "it is not supported yet; leave it out",
}
_REFUSED_FAMILIES = {
    "--rl-": "it belongs to megatron.rl; see --help for the --rollout-* flags",
    "--exit-": "a run ends after --num-steps",
    "--wandb-": "metrics go to RUNS_DIR/RUN_NAME/metrics.jsonl and tensorboard/",
    "--tensorboard-": "metrics go to RUNS_DIR/RUN_NAME/metrics.jsonl and tensorboard/",
    "--log-": "every metric is logged at every step, to metrics.jsonl and tensorboard/",
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
_POSITIVE = (
    "grpo_prompts_per_step",
    "grpo_iterations",
    "global_batch_size",
    "num_steps",
    "eval_interval",
    "keep_last",
    "max_prompt_tokens",
    "max_tokens_per_microbatch",
    "rollout_max_tokens",
    "rollout_max_batches",
    "rollout_max_running",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse Megatron flags that would be ignored. Raises UserError naming the flag and what to use instead."""
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag in _REFUSED:
            raise UserError(f"{flag} is not used here: {_REFUSED[flag]}")
        if flag in _PRETRAINING_DATA:
            raise UserError(f"{flag} is for pre-training; give prompts with --prompt-data")
        for family, instead in _REFUSED_FAMILIES.items():
            if flag.startswith(family):
                raise UserError(f"{flag} is not used here: {instead}")


def check(args: argparse.Namespace) -> None:
    """Check parsed arguments. Raises UserError naming the flag, the value seen and the fix."""
    for name in _POSITIVE:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must not be negative")
    _check_batch(args)
    _check_algorithm(args)
    _check_parallel(args)
    if args.dry_run and not args.hf_model and not args.prompt_data:
        return  # a preset's arithmetic needs no model
    if not args.hf_model:
        raise UserError("--hf-model is missing: give the Hugging Face folder of the model to train")
    if not args.prompt_data and not args.train_from_rollouts:
        raise UserError("--prompt-data is missing: give at least one file of prompts")
    _check_prompt_weights(args)
    _check_eval_data(args.eval_data)
    _check_rollout_folders(args)
    _check_run_folder(args)
    _check_save_hf(args)


def _check_prompt_weights(args: argparse.Namespace) -> None:
    weights, paths = args.prompt_weights, args.prompt_data or []
    if weights and len(weights) != len(paths):
        raise UserError(
            f"--prompt-weights has {len(weights)} values for {len(paths)} --prompt-data paths; give one each"
        )
    if weights and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
        raise UserError(f"--prompt-weights {weights} must be 0 or more, and one of them positive")


def parse_eval_data(spec: str) -> tuple[str, str, int]:
    """Split ``NAME:PATH:N`` into its parts. Raises UserError."""
    match = re.fullmatch(r"([\w.-]+):(.+):([1-9]\d*)", spec)
    if match is None:
        raise UserError(
            f"--eval-data {spec!r} is not NAME:PATH:N, for example aime24:data/aime24.jsonl:32 "
            f"(letters, digits, '.', '_' and '-' in NAME)"
        )
    return match[1], match[2], int(match[3])


def _check_eval_data(specs: Sequence[str]) -> None:
    names = [parse_eval_data(spec)[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--eval-data names {name!r} twice; give every set a name of its own")


def _check_rollout_folders(args: argparse.Namespace) -> None:
    if args.rollout_only and args.train_from_rollouts:
        raise UserError("--rollout-only and --train-from-rollouts exclude each other: run one after the other")
    if args.train_from_rollouts and not Path(args.train_from_rollouts).is_dir():
        raise UserError(
            f"--train-from-rollouts {args.train_from_rollouts} is no folder; give what --rollout-only wrote"
        )
    if args.rollout_only and any(Path(args.rollout_only).glob("step_*[0-9]")):
        raise UserError(f"--rollout-only {args.rollout_only} already holds rollouts; give a new folder")


def _check_run_folder(args: argparse.Namespace) -> None:
    """A run's records and checkpoints are never started over, and only its own checkpoints continue it."""
    run = RunFolder(Path(args.runs_dir), args.run_name)
    if args.load:
        check_loadable(args.load, finetune=args.finetune)
    continues = args.load and not args.finetune and Path(args.load).resolve() == run.checkpoints.resolve()
    if (run.metrics.exists() or run.checkpoints.exists()) and not (continues or args.dry_run or args.rollout_only):
        raise UserError(
            f"{run.path} already holds a run; continue it with --load {run.checkpoints}, choose another --run-name, "
            f"or remove the folder"
        )


def _check_save_hf(args: argparse.Namespace) -> None:
    if not args.save_hf:
        return
    out = Path(args.save_hf).resolve()
    if out == Path(args.hf_model).resolve():
        raise UserError(f"--save-hf {args.save_hf} is the model that training starts from; give another folder")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--save-hf {args.save_hf} exists and is no Hugging Face folder; give a new or an empty folder")


def _check_batch(args: argparse.Namespace) -> None:
    group, prompts, update = args.grpo_group_size, args.grpo_prompts_per_step, args.global_batch_size
    if group < 2:
        raise UserError(f"--grpo-group-size {group}: an advantage is relative to its group; use at least 2")
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
    if not 0 <= args.fipo_weight_low <= 1 <= args.fipo_weight_high:
        raise UserError(
            f"--fipo-weight-low {args.fipo_weight_low} and --fipo-weight-high {args.fipo_weight_high} must enclose 1"
        )
    loss_config(args)
    if not args.rollout_temperature > 0:
        raise UserError(
            f"--rollout-temperature {args.rollout_temperature} must be positive; greedy rollouts have no contrast"
        )
    if not 0 < args.eval_top_p <= 1:
        raise UserError(f"--eval-top-p {args.eval_top_p} must be in (0, 1]")
    if not args.reward_timeout > 0:
        raise UserError(f"--reward-timeout {args.reward_timeout} must be positive")
    parse_terms(args.reward_function)
    if not 0 <= args.reward_overlong_buffer < args.rollout_max_tokens:
        raise UserError(
            f"--reward-overlong-buffer {args.reward_overlong_buffer} must be less than "
            f"--rollout-max-tokens {args.rollout_max_tokens}"
        )


def _check_parallel(args: argparse.Namespace) -> None:
    for flag in ("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"):
        if getattr(args, flag) != 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not supported yet; leave it at 1")
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

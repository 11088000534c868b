"""Everything about a command line that can be known to be wrong before anything starts."""

import argparse
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_fipo.data.layouts import TEMPLATES
from megatron_fipo.errors import UserError
from megatron_fipo.model.build import uses_transformer_engine
from megatron_fipo.model.fp8_training import check_fp8
from megatron_fipo.model.hf_config import architecture, read_hf_config
from megatron_fipo.rewards.functions import parse_terms
from megatron_fipo.rollout.sglang.flags import DESCRIBING
from megatron_fipo.rollout.sglang.served import check_rollout_weights
from megatron_fipo.settings import advantage_config, correction_config, kl_estimator, loss_config, pack_alignment

_POSITIVE = (
    "grpo_prompts_per_step",
    "grpo_group_size",
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
    "weight_sync_bucket_mb",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
_NOT_NEGATIVE = ("lr", "lr_warmup_iters", "weight_decay", "clip_grad", "reward_overlong_penalty")
_SHAPES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "num_experts", "moe_ffn_hidden_size",
)  # fmt: skip

# What a loss reads of --fipo-*; fipo reads them all.
_FIPO_FLAGS: dict[str, tuple[str, ...]] = {
    "dapo": ("--fipo-semantics", "--fipo-dual-clip"),
    "grpo": (),
    "gspo": (),
    "cispo": (),
    "reinforce++": (),
}
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_FREE_IN_A_REFERENCE = {"max_position_embeddings", "init_method_std"}


def check(args: argparse.Namespace, *, training: bool = True) -> None:
    """Check parsed arguments, without ``training`` those of an evaluation.

    Raises UserError naming the flag, the value seen and the fix.
    """
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and value < 1:  # None: known after the start only
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in _NOT_NEGATIVE:
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be a finite number from 0 up")
    if args.save_interval is not None and args.save_interval < 1:
        raise UserError(f"--save-interval {args.save_interval} must be at least 1; leave it out to save nothing")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must not be negative")
    if training:
        _check_batch(args)
    _check_algorithm(args)
    _check_parallel(args)
    _check_fp8(args)
    _check_engine(args)
    _check_trackers(args)
    if args.dry_run and not args.hf_model and not args.prompt_data:
        return  # a preset's arithmetic needs no model
    if not args.hf_model:
        raise UserError("--hf-model is missing: give the Hugging Face folder of the model")
    _check_shapes(args)
    if not training and not args.eval_data:
        raise UserError("--eval-data is missing: give at least one set, for example aime24:aime24.jsonl:32")
    if training and not args.prompt_data and not args.train_from_rollouts:
        raise UserError("--prompt-data is missing: give at least one file of prompts")
    _check_prompts(args)
    _check_eval_data(args.eval_data)
    _check_rollout_folders(args)
    _check_save_hf(args)
    if args.rollout_engine == "sglang":
        check_rollout_weights(args, training=training)
        _check_window(args)


def _check_shapes(args: argparse.Namespace) -> None:
    for name, value in architecture(args.hf_model).items():
        if name in _SHAPES and getattr(args, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: the model of --hf-model has {value}; leave it out"
            )


def _check_trackers(args: argparse.Namespace) -> None:
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb-project {args.wandb_project}: Weights & Biases is not installed; run "
            f"pip install 'megatron-fipo[wandb]', or leave it out"
        )
    for name in ("wandb_exp_name", "wandb_entity", "wandb_save_dir"):
        if getattr(args, name) and not args.wandb_project:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} needs --wandb-project")


def _check_prompts(args: argparse.Namespace) -> None:
    if args.problem_template not in TEMPLATES and "{problem}" not in args.problem_template:
        raise UserError(
            f"--problem-template {args.problem_template!r} is none of {', '.join(TEMPLATES)}; a text needs {{problem}}"
        )
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
    if args.train_from_rollouts and not any(Path(args.train_from_rollouts).glob("step_*[0-9]")):
        raise UserError(
            f"--train-from-rollouts {args.train_from_rollouts} holds no rollouts; give the folder that --rollout-only "
            "wrote"
        )
    for flag, folder in (("--runs-dir", args.runs_dir), ("--rollout-only", args.rollout_only)):
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder} is no folder; give another name")
    if args.finetune and not args.load:
        raise UserError("--finetune starts from the weights of a checkpoint; name it with --load, or leave it out")
    if args.rollout_only and any(Path(args.rollout_only).glob("step_*[0-9]")):
        raise UserError(f"--rollout-only {args.rollout_only} already holds rollouts; give a new folder")


def _check_save_hf(args: argparse.Namespace) -> None:
    if not args.save_hf:
        return
    out = Path(args.save_hf).resolve()
    for flag, folder in (("--hf-model", args.hf_model), ("--reference-model", args.reference_model)):
        if folder and out == Path(folder).resolve():
            raise UserError(f"--save-hf {args.save_hf} is {flag}, which a resumed run reads again; give another folder")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--save-hf {args.save_hf} exists and is no Hugging Face folder; give a new or an empty folder")


def _check_batch(args: argparse.Namespace) -> None:
    group, prompts, update = args.grpo_group_size, args.grpo_prompts_per_step, args.global_batch_size
    if group < 2 and args.advantage != "batch":
        raise UserError(
            f"--grpo-group-size {group}: --advantage {args.advantage} is relative to the group; use at least 2, or "
            "--advantage batch"
        )
    if group < 2 and args.rollout_dynamic_sampling:
        raise UserError(
            f"--grpo-group-size {group}: one response is never both right and wrong; add --no-rollout-dynamic-sampling"
        )
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
    replicas = args.world_size // model_parallel_size(args)
    if replicas and update % replicas:
        raise UserError(
            f"--global-batch-size {update} does not divide over {replicas} data-parallel replicas; "
            f"use a multiple of {replicas}"
        )


def _check_algorithm(args: argparse.Namespace) -> None:
    _check_loss_flags(args)
    if args.loss == "fipo" and not 0 <= args.fipo_weight_low <= 1 <= args.fipo_weight_high:
        raise UserError(
            f"--fipo-weight-low {args.fipo_weight_low} and --fipo-weight-high {args.fipo_weight_high} must enclose 1"
        )
    loss_config(args)
    advantage_config(args)
    correction_config(args)
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


def _check_loss_flags(args: argparse.Namespace) -> None:
    """Flags that the chosen loss would not read, and terms beside the policy gradient."""
    given = [word.split("=")[0] for word in args.command_line]
    for flag in given:
        if flag.startswith("--fipo-") and flag not in _FIPO_FLAGS.get(args.loss, (flag,)):
            raise UserError(f"{flag} says nothing about --loss {args.loss}; leave it out, or use --loss fipo")
    for flag, value in (
        ("--grpo-kl-beta", args.grpo_kl_beta),
        ("--grpo-entropy-term-weight", args.grpo_entropy_term_weight),
    ):
        if not 0 <= value < math.inf:
            raise UserError(f"{flag} {value} must be a finite number from 0 up")
    if args.advantage != "batch" and "--return-gamma" in given:
        raise UserError(f"--return-gamma is for --advantage batch, not {args.advantage}; leave it out")
    if not args.grpo_kl_beta:
        for flag in ("--reference-model", "--kl-estimator", "--kl-in"):
            if flag in given:
                raise UserError(f"{flag} needs a KL to the reference model; give its weight with --grpo-kl-beta")
        return
    if args.kl_in == "loss" and kl_estimator(args) == "k1":
        raise UserError(
            "--kl-estimator k1 has no gradient in expectation as a term of the loss; use k2 or k3, or --kl-in reward"
        )
    if args.reference_model and args.hf_model:
        own, other = architecture(args.hf_model), architecture(args.reference_model)
        for name in own.keys() - _FREE_IN_A_REFERENCE:
            if own[name] != other.get(name):
                raise UserError(
                    f"--reference-model {args.reference_model} has {name} {other.get(name)} where --hf-model has "
                    f"{own[name]}; give a model of the same architecture"
                )


def model_parallel_size(args: argparse.Namespace) -> int:
    """Ranks that hold one replica of the model."""
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def _check_engine(args: argparse.Namespace) -> None:
    given = [f for f in ("--sglang-servers", "--sglang-url") if getattr(args, f[2:].replace("-", "_")) is not None]
    if args.rollout_engine != "sglang":
        if given or args.sglang_flags or args.sglang_colocate:
            flag = (*given, *(f"--sglang-{f[2:]}" for f in args.sglang_flags), "--sglang-colocate")[0]
            raise UserError(f"{flag} needs --rollout-engine sglang")
        return
    if len(given) != 1:
        raise UserError(
            "--rollout-engine sglang needs either --sglang-servers N (start N on each node) or --sglang-url URL..."
        )
    if args.sglang_colocate and args.sglang_url is not None:
        raise UserError("--sglang-colocate is for servers that are started here; use --sglang-servers N")
    if args.sglang_colocate and any("expandable_segments:True" in os.environ.get(name, "") for name in _ALLOCATOR):
        raise UserError(
            "--sglang-colocate hands weights over by CUDA IPC, which PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
            "prevents; set it to nothing: export PYTORCH_CUDA_ALLOC_CONF="
        )
    if args.sglang_url is not None:
        passed = [flag for flag in args.sglang_flags if flag.startswith("--") and flag not in DESCRIBING]
        if passed or args.sglang_port:
            flag = passed[0][2:] if passed else "port"
            raise UserError(f"--sglang-{flag} is for servers that are started here; give it to those of --sglang-url")
        for url in args.sglang_url:
            if not re.fullmatch(r"https?://[^/\s]+/?", url):
                raise UserError(f"--sglang-url {url} is no server's address; give e.g. http://10.0.0.5:30000")
        if args.check_weights and torch.cuda.is_available() and importlib.util.find_spec("sglang") is None:
            raise UserError(
                "--check-weights: on a GPU SGLang's own kernel computes the checksums, and SGLang is not installed "
                "here; train in a container that has the servers' SGLang, or leave it out"
            )
        return
    if args.sglang_servers < 1:
        raise UserError(f"--sglang-servers {args.sglang_servers} must be at least 1")
    if args.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)) and args.sglang_host == "127.0.0.1":
        raise UserError(
            "--sglang-host 127.0.0.1 cannot be reached from the other nodes; name the interface that joins them, "
            "e.g. eth0"
        )
    if importlib.util.find_spec("sglang") is None and not args.dry_run:
        raise UserError("--sglang-servers: SGLang is not installed; run 'make sglang', or use a container that has it")


def _check_window(args: argparse.Namespace) -> None:
    """A server refuses a request that may exceed the window of its config.json; the trainer's grows by itself."""
    window = read_hf_config(args.hf_model)["max_position_embeddings"]
    if args.max_prompt_tokens + args.rollout_max_tokens > window:
        raise UserError(
            f"--max-prompt-tokens {args.max_prompt_tokens} and --rollout-max-tokens {args.rollout_max_tokens} exceed "
            f"max_position_embeddings {window} of {args.hf_model}/config.json, which bounds SGLang's requests; raise "
            f"it there, for trainer and servers"
        )


def _check_fp8(args: argparse.Namespace) -> None:
    check_fp8(args)
    if args.fp8 and not args.dry_run and not uses_transformer_engine(args.transformer_impl):
        fix = "leave out --transformer-impl local" if uses_transformer_engine() else "use an NGC PyTorch container"
        raise UserError(f"FP8 needs TransformerEngine's layers on a GPU, and this run would not use them; {fix}")
    if args.max_tokens_per_microbatch < pack_alignment(args):
        raise UserError(
            f"--max-tokens-per-microbatch {args.max_tokens_per_microbatch} is less than the {pack_alignment(args)} "
            f"tokens that FP8 packs are filled up to; raise it"
        )


def expert_parallel_size(args: argparse.Namespace) -> int:
    """Ranks that hold all experts once."""
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size * tensor * args.pipeline_model_parallel_size


def _check_parallel(args: argparse.Namespace) -> None:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    heads, layers = args.num_attention_heads, args.num_layers
    if heads and heads % tensor:
        groups = args.num_query_groups or heads
        fits = [t for t in range(1, heads + 1) if heads % t == 0 and (groups % t == 0 or t % groups == 0)]
        raise UserError(
            f"--tensor-model-parallel-size {tensor} does not divide the model's {heads} attention heads; "
            f"use one of {fits}"
        )
    if layers and pipeline > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {pipeline}: the model has only {layers} layers; use at most {layers}"
        )
    if args.sequence_parallel and tensor == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1; leave it out")
    if args.cp_comm_type != ["p2p"] and not uses_transformer_engine(args.transformer_impl):
        raise UserError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)} is TransformerEngine's choice, which is not used here: the "
            f"local attention gathers keys and values; leave it out"
        )
    size = model_parallel_size(args)
    if args.world_size % size:
        raise UserError(
            f"{args.world_size} ranks cannot hold replicas of --tensor-model-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {pipeline} x --context-parallel-size {args.context_parallel_size} = "
            f"{size} ranks; start a multiple of {size}"
        )
    if args.expert_tensor_parallel_size is not None and (args.expert_tensor_parallel_size < 1 or not args.num_experts):
        raise UserError(
            f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size} must be at least 1, and needs a model "
            f"with experts; leave it out"
        )
    experts = expert_parallel_size(args)
    if args.num_experts and args.world_size % experts:
        raise UserError(
            f"{args.world_size} ranks cannot hold --expert-model-parallel-size {args.expert_model_parallel_size} x "
            f"expert tensor parallel size x --pipeline-model-parallel-size {pipeline} = {experts} ranks; start a "
            f"multiple of {experts}"
        )
    if not args.num_experts and args.expert_model_parallel_size > 1:
        raise UserError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: the model has no experts; leave it out"
        )

"""What follows from the flags: as one JSON object for --dry-run, as a few lines at the start of a run."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

from megatron_fipo.loss import FipoConfig
from megatron_fipo.model.fp8_training import fp8_settings
from megatron_fipo.rollout.sglang.served import check_rollout_weights
from megatron_fipo.settings import advantage_config, kl_estimator, loss_config, pack_alignment
from megatron_fipo.validation import model_parallel_size


def banner(args: argparse.Namespace) -> dict[str, str]:
    """The same in a few lines, for a person who watches the start."""
    n = batch_arithmetic(args)
    return {
        "model": args.hf_model,
        "ranks": f"{n['world_size']}: "
        + ", ".join(f"{kind} parallel {n[f'{kind}_parallel']}" for kind in ("data", "tensor", "pipeline", "context")),
        "rollout": f"{n['prompts_per_step']} prompts x {n['group_size']} = {n['samples_per_step']:,} samples a step, "
        f"up to {n['max_response_tokens']:,} tokens each",
        "updates": f"{n['updates_per_step']} a step of {n['samples_per_update']:,} samples",
        "loss": ", ".join(_loss_in_words(n)),
        "schedule": f"{n['num_steps']} steps, learning rate {n['lr']:g} after {n['lr_warmup_steps']} steps of warm-up",
    }


def _loss_in_words(n: dict[str, Any]) -> Iterator[str]:
    low, high = n["clip_range"]
    yield f"{n['loss']}, ratio in [{1 - low:g}, {1 + high:g}], by {n['normalization']}, advantages by {n['advantage']}"
    if "fipo_half_life" in n:
        yield "half-life {:g} tokens, weights in [{:g}, {:g}]".format(n["fipo_half_life"], *n["fipo_weight_range"])
    if "kl_weight" in n:
        yield f"{n['kl_weight']:g} KL ({n['kl_estimator']} in the {n['kl_in']}) to {n['reference_model']}"
    if "entropy_weight" in n:
        yield f"entropy bonus {n['entropy_weight']:g}"


def _loss_arithmetic(args: argparse.Namespace) -> dict[str, Any]:
    """What the loss reads of its flags; what it does not read is left out."""
    loss, advantage = loss_config(args), advantage_config(args)
    values = {
        "loss": args.loss,
        "normalization": loss.resolved_normalization,
        "clip_range": [loss.policy.clip_low, loss.policy.clip_high],
        "advantage": advantage.kind,
    }
    if args.loss in ("fipo", "dapo"):
        policy = cast(FipoConfig, loss.policy)
        values["fipo_semantics"] = policy.semantics
        values["fipo_weight_range"] = [policy.weight_low, policy.weight_high]
        if loss.influence:
            values |= {"fipo_half_life": policy.half_life, "fipo_safety_threshold": policy.safety_threshold}
        if loss.influence or loss.clips_twice:
            values["fipo_dual_clip"] = policy.dual_clip
    if advantage.kind == "batch":
        values["return_gamma"] = advantage.gamma
    if args.grpo_kl_beta:
        values |= {"kl_weight": args.grpo_kl_beta, "kl_estimator": kl_estimator(args), "kl_in": args.kl_in}
        values["reference_model"] = args.reference_model or args.hf_model
    if loss.entropy_weight:
        values["entropy_weight"] = loss.entropy_weight
    return values


def batch_arithmetic(args: argparse.Namespace) -> dict[str, Any]:
    """Every number that follows from the flags, as printed at the start and by --dry-run."""
    samples = args.grpo_prompts_per_step * args.grpo_group_size
    fp8 = fp8_settings(args)
    known = args.rollout_engine == "sglang" and args.hf_model
    return {
        "preset": args.preset,
        **_loss_arithmetic(args),
        "prompts_per_step": args.grpo_prompts_per_step,
        "group_size": args.grpo_group_size,
        "samples_per_step": samples,
        "samples_per_update": args.global_batch_size,
        "prompts_per_update": args.global_batch_size // args.grpo_group_size,
        "updates_per_step": samples // args.global_batch_size * args.grpo_iterations,
        "num_steps": args.num_steps,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.rollout_max_tokens,
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
        "overlong_buffer": args.reward_overlong_buffer,
        "overlong_penalty": args.reward_overlong_penalty,
        "temperature": args.rollout_temperature,
        "lr": args.lr,
        "lr_warmup_steps": args.lr_warmup_iters,
        "weight_decay": args.weight_decay,
        "clip_grad": args.clip_grad,
        "world_size": args.world_size,
        "tensor_parallel": args.tensor_model_parallel_size,
        "pipeline_parallel": args.pipeline_model_parallel_size,
        "context_parallel": args.context_parallel_size,
        "data_parallel": args.world_size // model_parallel_size(args),
        "fp8": fp8 and asdict(fp8) | {"pack_alignment": pack_alignment(args)},
        "precision": check_rollout_weights(args, training=False).summary() if known else None,
    }

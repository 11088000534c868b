"""Named sets of defaults; an explicit flag always wins.

Values of the paper (arXiv 2603.19835, Table 3) and of its released scripts; ``dapo`` is the paper's baseline. Another
loss brings what its own paper asks for. Keys are argument names, Megatron's own where Megatron has the flag.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "loss": "fipo",
    "fipo_semantics": "official",
    "fipo_half_life": 32.0,
    "fipo_dual_clip": 10.0,
    "grpo_clamp_eps_lower": 0.2,
    "grpo_clamp_eps_upper": 0.28,
    "grpo_iterations": 1,
    "grpo_kl_beta": 0.0,
    "grpo_entropy_term_weight": 0.0,
    "grpo_prompts_per_step": 512,
    "max_prompt_tokens": 2048,
    "rollout_temperature": 1.0,
    "rollout_max_batches": 10,
    "max_tokens_per_microbatch": 32768,  # room for the longest sample and level packs
    "eval_top_p": 0.7,
    "reward_overlong_penalty": 1.0,
    "lr": 1e-6,
    "lr_decay_style": "constant",
    "lr_warmup_iters": 10,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "num_steps": 500,
    "eval_interval": 10,
}

_FIPO_32B: dict[str, Any] = {
    **_COMMON,
    "fipo_weight_low": 1.0,
    "fipo_weight_high": 1.2,
    "fipo_safety_threshold": 10.0,
    "grpo_group_size": 16,
    "global_batch_size": 64 * 16,
    "rollout_max_tokens": 20480,
    "reward_overlong_buffer": 4096,
    "distributed_timeout_minutes": 60,  # replicas wait for the one with the longest responses
}

PRESETS: dict[str, dict[str, Any]] = {
    "fipo-32b": _FIPO_32B,
    "fipo-7b": {
        **_FIPO_32B,
        "fipo_weight_low": 0.8,
        "fipo_safety_threshold": 3.0,
        "grpo_group_size": 32,
        "global_batch_size": 64 * 32,
        "rollout_max_tokens": 10240,
        "reward_overlong_buffer": 2048,
    },
    "dapo": {
        **_FIPO_32B,
        "loss": "dapo",
        "fipo_weight_low": 1.0,
        "fipo_weight_high": 1.0,
        "global_batch_size": 32 * 16,
    },
    "quickstart": {
        **_FIPO_32B,
        "run_name": "quickstart",
        "grpo_prompts_per_step": 64,
        "grpo_group_size": 8,
        "global_batch_size": 128,
        "max_prompt_tokens": 32,
        "rollout_max_tokens": 56,
        "distributed_timeout_minutes": 10,
        "reward_overlong_buffer": 0,
        "max_tokens_per_microbatch": 4096,
        "eval_top_p": 1.0,
        "lr": 2e-4,
        "lr_warmup_iters": 5,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "num_steps": 30,
        "eval_interval": 10,
    },
}

DEFAULT_PRESET = "fipo-32b"

_GRPO: dict[str, Any] = {"advantage": "group", "kl_in": "loss"}

LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "fipo": _GRPO,
    "dapo": _GRPO,
    "grpo": {**_GRPO, "loss_normalization": "sequence", "grpo_clamp_eps_lower": 0.2, "grpo_clamp_eps_upper": 0.2},
    # arXiv 2507.18071, Section 5.1: the ratio of a whole response moves little
    "gspo": {**_GRPO, "loss_normalization": "sequence", "grpo_clamp_eps_lower": 3e-4, "grpo_clamp_eps_upper": 4e-4},
    # no lower bound, as in arXiv 2506.13585; weights up to 5, as in arXiv 2510.13786
    "cispo": {**_GRPO, "loss_normalization": "token", "grpo_clamp_eps_lower": 1.0, "grpo_clamp_eps_upper": 4.0},
    "reinforce++": {
        "advantage": "batch",
        "kl_in": "reward",
        "loss_normalization": "token",
        "grpo_clamp_eps_lower": 0.2,
        "grpo_clamp_eps_upper": 0.2,
    },
}
"""What --loss changes in a preset."""

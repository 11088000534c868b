"""Typed settings from the parsed flags."""

import argparse
import functools
from collections.abc import Callable, Sequence

from megatron_fipo.data.planning import UpdatePlan, plan_step
from megatron_fipo.errors import UserError
from megatron_fipo.loss import AdvantageConfig, CorrectionConfig, FipoConfig, LossConfig, RatioConfig
from megatron_fipo.loss.config import RATIOS
from megatron_fipo.model.cost import CostModel
from megatron_fipo.model.fp8_training import GATHER_BLOCK, row_multiple
from megatron_fipo.rollout.collect import CollectSettings
from megatron_fipo.rollout.engine import SamplingParams


def loss_config(args: argparse.Namespace) -> LossConfig:
    """The loss's settings. Raises UserError for a value out of range."""
    low, high = args.grpo_clamp_eps_lower, args.grpo_clamp_eps_upper
    policy: FipoConfig | RatioConfig
    try:
        if args.loss in ("fipo", "dapo"):
            fipo = args.loss == "fipo"
            policy = FipoConfig(
                half_life=args.fipo_half_life,
                weight_low=args.fipo_weight_low if fipo else 1.0,
                weight_high=args.fipo_weight_high if fipo else 1.0,
                safety_threshold=args.fipo_safety_threshold,
                dual_clip=args.fipo_dual_clip,
                clip_low=low,
                clip_high=high,
                semantics=args.fipo_semantics,
                normalization=args.loss_normalization,
                sequence_filter=None if fipo else False,
            )
        elif args.loss in RATIOS:
            policy = RatioConfig(args.loss, low, high, args.loss_normalization)
        else:
            policy = FipoConfig.clipped_ratio(low, high, args.loss_normalization)
        return LossConfig(
            policy,
            kl_weight=args.grpo_kl_beta if args.kl_in == "loss" else 0.0,
            kl_estimator=kl_estimator(args),
            entropy_weight=args.grpo_entropy_term_weight,
        )
    except ValueError as error:
        raise UserError(f"--loss {args.loss}, --fipo-* and --grpo-*: {error}") from error


def advantage_config(args: argparse.Namespace) -> AdvantageConfig:
    """How rewards become advantages. Raises UserError for a value out of range."""
    try:
        return AdvantageConfig(
            kind=args.advantage,
            gamma=args.return_gamma,
            kl_weight=args.grpo_kl_beta if args.kl_in == "reward" else 0.0,
            kl_estimator=kl_estimator(args),
        )
    except ValueError as error:
        raise UserError(f"--advantage {args.advantage}, --return-gamma and --grpo-kl-beta: {error}") from error


def kl_estimator(args: argparse.Namespace) -> str:
    """The given one, or by default that with a useful gradient in the loss, and the unbiased k1 in the reward."""
    return args.kl_estimator or {"loss": "k3", "reward": "k1"}[args.kl_in]


def correction_config(args: argparse.Namespace) -> CorrectionConfig:
    """The importance correction's settings. Raises UserError for a value out of range."""
    try:
        return CorrectionConfig.parse(args.rollout_correction)
    except ValueError as error:
        raise UserError(f"--rollout-correction: {error}") from error


def cost_model(args: argparse.Namespace) -> CostModel:
    """What a sequence costs on this architecture."""
    ffn_hidden_size = args.ffn_hidden_size
    if args.num_experts:
        width_of_experts = args.moe_router_topk * args.moe_ffn_hidden_size
        with_experts = 1.0 if args.moe_layer_freq == 1 else sum(args.moe_layer_freq) / args.num_layers
        ffn_hidden_size = with_experts * width_of_experts + (1 - with_experts) * args.ffn_hidden_size
    return CostModel(
        layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
    )


def sequence_alignment(args: argparse.Namespace) -> int:
    """What the length of a packed sequence is a multiple of.

    Context parallelism cuts each sequence into 2 x its size chunks; sequence parallelism cuts every rank's tokens.
    """
    tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context = args.context_parallel_size
    return tensor * (2 * context if context > 1 else 1)


def pack_alignment(args: argparse.Namespace) -> int:
    """What the length of a whole pack is a multiple of: 1, and with FP8 what its kernels want of every rank's share.

    With sequence parallelism, block scaling gathers activations in FP8 if shares consist of whole blocks, else in BF16
    to the same values; packs are filled up that far where it costs little.
    """
    if not args.fp8:
        return 1
    shares = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    whole_blocks = GATHER_BLOCK * shares
    if (
        args.fp8_recipe == "blockwise"
        and args.sequence_parallel
        and 16 * whole_blocks <= args.max_tokens_per_microbatch
    ):
        return whole_blocks
    return row_multiple(args.fp8_recipe) * shares


def planner(args: argparse.Namespace) -> Callable[[Sequence[int]], list[UpdatePlan]]:
    """Lengths of a step's samples -> which sample goes into which update, replica and micro-batch."""
    pipeline, interleaved = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    return functools.partial(
        plan_step,
        samples_per_update=args.global_batch_size,
        replicas=args.data_parallel_size,
        max_tokens=args.max_tokens_per_microbatch,
        cost=cost_model(args),
        pipeline_stages=pipeline,
        alignment=sequence_alignment(args),
        pack_alignment=pack_alignment(args),
        micro_batch_multiple=(args.microbatch_group_size_per_vp_stage or pipeline) if interleaved else 1,
    )


def collect_settings(args: argparse.Namespace, stop_token_ids: tuple[int, ...]) -> CollectSettings:
    """What a step's rollout consists of. Training samples are drawn from the whole distribution (top-p 1)."""
    return CollectSettings(
        prompts_per_step=args.grpo_prompts_per_step,
        group_size=args.grpo_group_size,
        sampling=SamplingParams(args.rollout_max_tokens, args.rollout_temperature, 1.0, stop_token_ids),
        seed=args.seed,
        dynamic_sampling=args.rollout_dynamic_sampling,
        max_batches=args.rollout_max_batches,
        overlong_buffer=args.reward_overlong_buffer,
        overlong_penalty=args.reward_overlong_penalty,
    )

"""FIPO's loss for Megatron-LM's own reinforcement learning loop, `train_rl.py` with `megatron.rl`.

Written against https://github.com/NVIDIA/Megatron-LM at commit d98e8a64ddf34856e74b24714e3bedb2f5a39553 (2026-08-22);
`python tools/check_megatron_checkout.py PATH` says what another checkout changed. There the loss is a function without
a response mask, which the future KL needs, so replacing it from outside would not be FIPO: docs/megatron_rl.md has the
two insertions that `train_rl.py` needs.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_fipo.errors import UserError
from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.ops.fused_loss import SUMS
from megatron_fipo.ops.library import has_kernels_for

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

# Sums over response tokens, by the names of the released code.
_REPORTED = {
    "actor/influence_weights_mean": "weight",
    "actor/influence_weights_mean_raw": "raw_weight",
    "actor/IW_upper_clip_ratio": "weight_at_high",
    "actor/IW_lower_clip_ratio": "weight_at_low",
    "actor/pg_clipfrac": "clipped",
    "actor/pg_clipfrac_lower": "dual_clipped",
    "fipo/active_fraction": "active",
}


def fipo_loss_function(
    args: argparse.Namespace,
    config: FipoConfig,
    *,
    loss_mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    inference_logprobs: Tensor | None = None,
    seq_starts: Sequence[int] | None = None,
    seq_lengths: Sequence[int] | None = None,
) -> LossFunction:
    """The loss function of one micro-batch, as `forward_step` returns it to Megatron's schedules.

    It maps the current log-probs to (sum of the token losses, kept response tokens, {name: [sum, count]}): with
    --calculate-per-token-loss Megatron divides once, by the tokens of the whole mini-batch over all ranks.

    args: Megatron's arguments. The names of the rest are those of `forward_step`. loss_mask, old_logprobs,
    inference_logprobs: [b, l], or [1, l] for a bin of packed sequences; position t is that of token t + 1. The mask is
    1 on response tokens. advantages: [b], or one for each sequence of the bin. inference_logprobs: what the engine
    reported, if the loss is to be corrected for it (--rl-inference-logprobs-is-correction). seq_starts, seq_lengths: of
    the bin's sequences; a last start behind them, the end of the used part, is allowed. None: not packed.

    Raises UserError for flags under which this would not be FIPO, ValueError for shapes that do not fit.
    """
    check_arguments(args, config)
    if loss_mask.shape != old_logprobs.shape:
        raise ValueError(f"loss_mask {list(loss_mask.shape)} and old_logprobs {list(old_logprobs.shape)} must fit")
    cu_seqlens_S1 = _cu_seqlens(loss_mask, seq_starts, seq_lengths)
    mask_T = loss_mask.reshape(-1) > 0
    old_logp_T = old_logprobs.reshape(-1).float()
    token_weight_T = None
    if inference_logprobs is not None:
        token_weight_T = (old_logp_T - inference_logprobs.reshape(-1).float()).exp()
        if args.rl_importance_sampling_truncation_coef is not None:
            token_weight_T = token_weight_T.clamp(max=args.rl_importance_sampling_truncation_coef)

    def loss_function(current_logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logp_T = current_logprobs.reshape(-1).float()
        out = fipo_loss(
            logp_T,
            old_logp_T,
            advantages.reshape(-1).float(),
            mask_T,
            cu_seqlens_S1,
            config,
            token_weight_T=token_weight_T,
            backend="compiled" if has_kernels_for(logp_T.device.type) else "torch",
        )
        sums = dict(zip(SUMS, out.token_statistics_K, strict=False))
        report = {name: torch.stack([sums[key], sums["tokens"]]) for name, key in _REPORTED.items()}
        report["actor/ppo_kl"] = torch.stack([-sums["log_ratio"], sums["tokens"]])
        report["lm loss"] = torch.stack([out.loss_sum.detach().double(), out.denominator])
        return out.loss_sum, out.denominator.int(), {name: pair.float() for name, pair in report.items()}

    return loss_function


def check_arguments(args: argparse.Namespace, config: FipoConfig) -> None:
    """Raises UserError, naming flag, value and fix, where train_rl.py's flags and the loss contradict each other."""
    if config.resolved_normalization != "token":
        raise UserError(
            f"normalization {config.resolved_normalization!r} needs the whole mini-batch, but train_rl.py computes its "
            "loss by micro-batches; use 'token'"
        )
    if not args.calculate_per_token_loss:
        raise UserError("--calculate-per-token-loss is missing: the loss would be averaged per micro-batch; add it")
    for flag, seen, wanted in (
        ("--grpo-clamp-eps-lower", args.grpo_clamp_eps_lower, config.clip_low),
        ("--grpo-clamp-eps-upper", args.grpo_clamp_eps_upper, config.clip_high),
        ("--grpo-kl-beta", args.grpo_kl_beta, 0.0),
        ("--grpo-entropy-term-weight", args.grpo_entropy_term_weight, 0.0),
    ):
        if seen != wanted:
            raise UserError(f"{flag} {seen:g} is not what the loss uses; give {flag} {wanted:g}")
    samples = args.grpo_prompts_per_step * args.grpo_group_size * args.grpo_iterations
    acts = (config.weight_low, config.weight_high) != (1.0, 1.0)
    if acts and samples < 2 * args.global_batch_size:
        raise UserError(
            f"one update per rollout ({samples} samples, --global-batch-size {args.global_batch_size}) makes every "
            f"influence weight 1 and FIPO equal to DAPO; lower --global-batch-size to at most {samples // 2}"
        )


def _cu_seqlens(loss_mask: Tensor, seq_starts: Sequence[int] | None, seq_lengths: Sequence[int] | None) -> Tensor:
    """int32 [S + 1]: rows, or the sequences of a bin, of which each reaches to the next one's start."""
    rows, width = loss_mask.shape
    if seq_starts is None or seq_lengths is None:
        boundaries = [width * row for row in range(rows + 1)]
    elif seq_lengths:
        boundaries = [*map(int, seq_starts[: len(seq_lengths)]), width]
    else:
        boundaries = [0]  # a bin without sequences, which fills up the number of micro-batches
    return torch.tensor(boundaries, dtype=torch.int32, device=loss_mask.device)

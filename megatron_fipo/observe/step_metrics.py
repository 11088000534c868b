"""The numbers of one training step, exact over replicas and micro-batches; docs/metrics.md says what each means."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.loss import FipoConfig, LossConfig, LossStatistics
from megatron_fipo.loss.metrics import HISTOGRAM_BINS, log_ratio_bin, log_ratio_of_bin
from megatron_fipo.loss.noise import weight_edge
from megatron_fipo.ops.packed import expand_to_tokens
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.parallel.zigzag import run_cu_seqlens
from megatron_fipo.rollout.rollout import Rollout

_GAP_QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Reward, accuracy and lengths over every generated sample, kept or not."""
    generated = rollout.generated
    lengths = generated.response_tokens
    low, median, high = torch.quantile(lengths, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {
        "reward/mean": generated.reward.mean().item(),
        "reward/accuracy": generated.correct.mean().item(),
        "reward/errors": generated.verifier_failed.sum().item(),
        "response/length_mean": lengths.mean().item(),
        "response/length_min": lengths.min().item(),
        "response/length_q25": low,
        "response/length_median": median,
        "response/length_q75": high,
        "response/length_max": lengths.max().item(),
        "response/truncated_fraction": generated.truncated.mean().item(),
        "rollout/generated_samples": len(lengths),
        "rollout/sampled_batches": rollout.batches,
        "rollout/kept_groups": len(rollout.kept),
        "rollout/dropped_groups": len(rollout.table) - len(rollout.kept) - len(rollout.spare),
        **_accuracy_by_length(lengths, generated.correct),
    }


def _accuracy_by_length(lengths: Tensor, correct: Tensor) -> dict[str, float]:
    """Accuracy of the shortest to the longest quarter of the responses, cut at the quantiles of length.

    A length that is a quantile belongs to the shorter side; a quarter that ties leave empty is left out.
    """
    edges = torch.quantile(lengths, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    quarter = torch.bucketize(lengths, edges)
    return {f"accuracy/length_q{q + 1}": correct[quarter == q].mean().item() for q in range(4) if (quarter == q).any()}


def staleness(rollout: Rollout, version: int, replicas: Replicas) -> dict[str, float]:
    """How many versions older than ``version``, the one before the step's updates, the weights were that drew the
    response tokens to train on. Collective over the replicas."""
    drawn = [ages for sample in rollout.held.values() for ages in sample.weight_versions]
    tokens = torch.tensor([end - begin for _, begin, end in drawn], dtype=torch.float64)
    age = torch.tensor([version - drew for drew, _, _ in drawn], dtype=torch.float64)
    total, count = replicas.all_reduce(torch.stack([(tokens * age).sum(), tokens.sum()])).tolist()
    oldest = replicas.all_reduce(torch.cat([age, age.new_zeros(1)]).max(), torch.distributed.ReduceOp.MAX)
    return {"rollout/staleness_mean": total / max(count, 1.0), "rollout/staleness_max": oldest.item()}


def policy_metrics(
    micro_batches: Sequence[PackedBatch],
    entropy_sum: Tensor,
    influence: FipoConfig | None,
    replicas: Replicas,
    stale_samples: int = 0,
) -> dict[str, float]:
    """Entropy, and the gap between the log-probs of engine and trainer, over all response tokens of the step.

    ``micro_batches`` hold this rank's tokens; without old log-probs (pipeline stages before the last) they count for
    nothing. Collective over all ranks.

    ``mismatch/kl`` is the k3 estimate of KL(engine || trainer); the quantiles of the absolute gap come from a histogram
    with the error that ``loss/metrics.py`` states. ``influence`` are the settings of FIPO's weights, None for a loss
    without: ``fipo/noise_gain`` is what the scan makes of independent noise on each log-prob; ``fipo/noise_budget`` the
    noise per token that would reach the nearer clip edge of f. A sum without discount has neither.
    The first ``stale_samples`` were drawn by earlier weights, whose gap is no mismatch; the entropy counts them.
    """
    context = replicas.context.size()
    gap = torch.cat([_engine_gap(batch, stale_samples, context) for batch in micro_batches])
    scored = [batch.response_mask_T.sum() for batch in micro_batches if batch.old_logp_T is not None]
    counts = gap.new_tensor([gap.numel(), sum(scored)])
    sums = torch.stack([entropy_sum, (gap.exp() - 1 - gap).sum(), gap.square().sum(), *counts])
    entropy, kl, square, tokens, all_tokens = replicas.all_reduce_pieces(sums).tolist()
    tokens, all_tokens = max(tokens, 1.0), max(all_tokens, 1.0)
    worst = torch.cat([gap.abs(), gap.new_zeros(1)]).max()
    worst = replicas.all_reduce_pieces(worst, torch.distributed.ReduceOp.MAX)
    counts = replicas.all_reduce_pieces(torch.bincount(log_ratio_bin(gap.abs()), minlength=HISTOGRAM_BINS))
    return {
        "actor/entropy": entropy / all_tokens,
        "mismatch/kl": kl / tokens,
        "mismatch/rms": math.sqrt(square / tokens),
        **{f"mismatch/{name}": min(_quantile(counts, q), worst.item()) for name, q in _GAP_QUANTILES.items()},
        "mismatch/max": worst.item(),
        **(_noise(influence) if influence else {}),
    }


def _noise(influence: FipoConfig) -> dict[str, float]:
    edge = weight_edge(influence)
    if math.isinf(edge) or math.isinf(influence.half_life):
        return {}
    gain = 1 / math.sqrt(1 - influence.gamma**2)
    return {"fipo/noise_gain": gain, "fipo/noise_budget": edge / gain}


def _quantile(counts: Tensor, q: float) -> float:
    """Of the values whose histogram is ``counts``, without interpolation."""
    rank = math.floor(q * (int(counts.sum()) - 1))
    return log_ratio_of_bin(int(torch.searchsorted(counts.cumsum(0), rank, right=True)))


def _engine_gap(batch: PackedBatch, stale_samples: int, context: int) -> Tensor:
    """log p of the trainer minus log p of the engine, fp64, of the response tokens that the present weights drew."""
    if batch.old_logp_T is None:
        return torch.zeros(0, dtype=torch.float64, device=batch.rollout_logp_T.device)
    counted_T = batch.response_mask_T
    if stale_samples:
        fresh_S, cu_seqlens_S1 = batch.sample_ids_S >= stale_samples, batch.cu_seqlens_padded_S1
        if context > 1:
            fresh_S, cu_seqlens_S1 = fresh_S.repeat_interleave(2), run_cu_seqlens(cu_seqlens_S1, context)
        counted_T = counted_T & expand_to_tokens(fresh_S, cu_seqlens_S1, len(counted_T))
    return (batch.old_logp_T - batch.rollout_logp_T)[counted_T].double()


def loss_metrics(updates: Sequence[LossStatistics], grad_norms: Sequence[float], loss: LossConfig) -> dict[str, Any]:
    """Of the whole step, its updates merged (the gradient norm: their mean), and of each update under "updates"."""
    whole = functools.reduce(LossStatistics.merge, updates)
    return {
        **whole.metrics_of(loss),
        "actor/grad_norm": sum(grad_norms) / len(grad_norms),
        "updates": [
            {**update.metrics_of(loss), "actor/grad_norm": norm}
            for update, norm in zip(updates, grad_norms, strict=True)
        ],
    }

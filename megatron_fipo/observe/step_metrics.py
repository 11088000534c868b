"""The numbers of one training step, exact over replicas and micro-batches; docs/metrics.md says what each means."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.loss import FipoConfig, LossStatistics
from megatron_fipo.loss.metrics import HISTOGRAM_BINS, log_ratio_bin, log_ratio_of_bin
from megatron_fipo.parallel.replicas import Replicas
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
        "rollout/dropped_groups": len(rollout.table) - len(rollout.kept),
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
    micro_batches: Sequence[PackedBatch], entropy_sum: Tensor, loss: FipoConfig, replicas: Replicas
) -> dict[str, float]:
    """Entropy, and the gap between the log-probs of engine and trainer, over all response tokens of the step.

    ``micro_batches`` hold this rank's tokens; without old log-probs (pipeline stages before the last) they count for
    nothing. Collective over all ranks.

    ``mismatch/kl`` is the k3 estimate of KL(engine || trainer); the quantiles of the absolute gap come from a histogram
    with the error that ``loss/metrics.py`` states. ``fipo/noise_gain`` is what the scan makes of
    independent noise on each log-prob; ``fipo/noise_budget`` the noise per token that would reach the nearer clip edge
    of f. Weights that are fixed at 1 have neither, nor has a sum without discount.
    """
    gap = torch.cat([_engine_gap(batch) for batch in micro_batches])
    sums = torch.stack([entropy_sum, (gap.exp() - 1 - gap).sum(), gap.square().sum(), gap.new_tensor(gap.numel())])
    entropy, kl, square, tokens = replicas.all_reduce_pieces(sums).tolist()
    tokens = max(tokens, 1.0)
    worst = torch.cat([gap.abs(), gap.new_zeros(1)]).max()
    worst = replicas.all_reduce_pieces(worst, torch.distributed.ReduceOp.MAX)
    counts = replicas.all_reduce_pieces(torch.bincount(log_ratio_bin(gap.abs()), minlength=HISTOGRAM_BINS))
    return {
        "actor/entropy": entropy / tokens,
        "mismatch/kl": kl / tokens,
        "mismatch/rms": math.sqrt(square / tokens),
        **{f"mismatch/{name}": min(_quantile(counts, q), worst.item()) for name, q in _GAP_QUANTILES.items()},
        "mismatch/max": worst.item(),
        **_noise(loss),
    }


def _noise(loss: FipoConfig) -> dict[str, float]:
    edges = [abs(math.log(edge)) for edge in (loss.weight_low, loss.weight_high) if edge not in (0.0, 1.0, math.inf)]
    if not edges or math.isinf(loss.half_life):
        return {}
    gain = 1 / math.sqrt(1 - 2 ** (-2 / loss.half_life))
    return {"fipo/noise_gain": gain, "fipo/noise_budget": min(edges) / gain}


def _quantile(counts: Tensor, q: float) -> float:
    """Of the values whose histogram is ``counts``, without interpolation."""
    rank = math.floor(q * (int(counts.sum()) - 1))
    return log_ratio_of_bin(int(torch.searchsorted(counts.cumsum(0), rank, right=True)))


def _engine_gap(batch: PackedBatch) -> Tensor:
    """log p of the trainer minus log p of the engine, fp64, of the response tokens."""
    if batch.old_logp_T is None:
        return torch.zeros(0, dtype=torch.float64, device=batch.rollout_logp_T.device)
    return (batch.old_logp_T - batch.rollout_logp_T)[batch.response_mask_T].double()


def loss_metrics(updates: Sequence[LossStatistics], grad_norms: Sequence[float]) -> dict[str, Any]:
    """Of the whole step, its updates merged (the gradient norm: their mean), and of each update under "updates"."""
    whole = functools.reduce(LossStatistics.merge, updates)
    return {
        **whole.metrics(),
        **whole.mean_advantage(),
        "actor/grad_norm": sum(grad_norms) / len(grad_norms),
        "updates": [
            {**update.metrics(), **update.mean_advantage(), "actor/grad_norm": norm}
            for update, norm in zip(updates, grad_norms, strict=True)
        ],
    }

"""A step of random samples, what ranks report about it, and the same numbers computed directly on the whole batch.

Log-probs are functions of a token and its position, so that every rank knows those of its own tokens and the direct
computation, in float64 and without packs, knows them all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_fipo.data.advantages import add_advantages
from megatron_fipo.data.batches import make_micro_batches
from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.data.planning import plan_step
from megatron_fipo.data.samples import Sample
from megatron_fipo.loss import AdvantageConfig, FipoConfig, LossConfig, LossStatistics
from megatron_fipo.model.cost import CostModel
from megatron_fipo.observe.efficiency import Efficiency, peak_memory
from megatron_fipo.observe.influence import best_and_worst, gather_weights
from megatron_fipo.observe.step_metrics import loss_metrics, policy_metrics, rollout_metrics, staleness
from megatron_fipo.parallel.loss import context_parallel_fipo_loss
from megatron_fipo.parallel.reduce import reduce_statistics
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.rollout import GeneratedSamples, Rollout

GROUPS, GROUP_SIZE, UPDATES, KEPT = 8, 4, 3, (0, 1, 3, 4, 6, 7)
VERSION = 5  # of the weights before the step's updates
CONFIG = FipoConfig(half_life=8.0, weight_low=0.8, weight_high=1.2, safety_threshold=3.0)
COST = CostModel(layers=2, hidden_size=16, ffn_hidden_size=24, heads=4, kv_heads=2, head_dim=8, vocab_size=93)
TIMES = {"time/rollout": 3.0, "time/old_logp": 0.5, "time/update": 1.5, "time/eval": 4.0, "time/step": 10.0}
PEAK = 1e6


@dataclass(frozen=True)
class Layout:
    """Two ranks as data-parallel replicas or as one context-parallel one, or a rank alone."""

    data: int
    context: int
    pack_tokens: int

    @property
    def alignment(self) -> int:
        return 2 * self.context if self.context > 1 else 1


LAYOUTS = {
    f"DP{data} CP{context} {name}": Layout(data, context, pack_tokens)
    for data, context in ((1, 1), (2, 1), (1, 2))
    for name, pack_tokens in (("one micro-batch", 4096), ("several micro-batches", 64))
}


def noise(kind: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """In [-1, 1], float64, the same for a token wherever it lies."""
    return np.sin(12.9898 * tokens + 78.233 * positions + 37.719 * kind)


def old_log_probs(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (-3 - 2 * noise(0, tokens, positions)).astype(np.float32)


def engine_log_probs(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return (old_log_probs(tokens, positions) + 0.02 * noise(1, tokens, positions) ** 3).astype(np.float32)


def log_probs(update: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """After ``update`` updates: mostly near the old ones, some beyond every threshold; equal to them at first."""
    step = noise(2 + update, tokens, positions)
    jump = np.where(step > 0, 3, 8) * step**9
    return (old_log_probs(tokens, positions) + min(update, 1) * (0.2 * step + jump)).astype(np.float32)


def entropies(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return 1 + noise(9, tokens, positions)


def make_samples() -> list[list[Sample]]:
    """By group. Very different lengths, holes in some masks, tokens of three versions of the weights."""
    random = np.random.default_rng(3)
    groups = []
    for g in range(GROUPS):
        prompt = random.integers(3, 93, random.integers(2, 12))
        group = []
        for i in range(GROUP_SIZE):
            response = random.integers(3, 93, min(60, 2 + int(random.lognormal(3, 1))))
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            mask[len(prompt) + 1 : len(prompt) + 3] = len(response) < 8
            changed = int(random.integers(0, len(response) + 1))
            correct = bool(random.random() < 0.5) if i else g % 2 == 0
            group.append(
                Sample(
                    prompt_id=g,
                    group_id=g,
                    tokens=tokens,
                    response_mask=mask,
                    rollout_logp=engine_log_probs(tokens, np.arange(len(tokens)) - 1) * mask,
                    finish_reason="length" if len(response) == 60 else "stop",
                    weight_versions=((VERSION - g % 3, 0, changed), (VERSION, changed, len(response))),
                    reward=2.0 * correct - 1 + random.normal(0, 0.1),
                    correct=correct,
                )  # fmt: skip
            )
        groups.append(group)
    return groups


def make_rollout(groups: Sequence[Sequence[Sample]], replica: int, replicas: int) -> Rollout:
    """As the replica knows it that generated every ``replicas``-th group."""
    rows = [[GeneratedSamples.row(sample, i == 2) for i, sample in enumerate(group)] for group in groups]
    own = {g: group for g, group in enumerate(groups) if g % replicas == replica}
    return Rollout.of(torch.tensor(rows, dtype=torch.float64), KEPT, range(len(rows)), own, batches=2)


def run_layout(layout: Layout, world: Mapping[str, dist.ProcessGroup]) -> dict:
    """What a rank reports."""
    data = world["all" if layout.data > 1 else "alone"]
    context = world["all" if layout.context > 1 else "alone"]
    pieces = (world["all" if layout.data * layout.context > 1 else "alone"],)
    replicas = Replicas(data.rank(), data.size(), data, context, pieces, (), torch.device("cpu"), leads=True)
    rollout = make_rollout(make_samples(), replicas.rank, replicas.size)
    plan = plan_step(
        rollout.packed_length_S.tolist(), len(KEPT) * GROUP_SIZE // UPDATES, replicas.size, layout.pack_tokens,
        cost=COST, alignment=layout.alignment,
    )  # fmt: skip
    updates = make_micro_batches(plan, rollout, LossConfig(CONFIG), replicas)
    updates = [[_with_old_log_probs(batch) for batch in update] for update in updates]
    updates, _ = add_advantages(updates, rollout, AdvantageConfig(), replicas)
    outs = [[_loss(batch, number, replicas.context) for batch in update] for number, update in enumerate(updates)]
    merged = []
    for update in outs:
        statistics = LossStatistics.empty()
        for out in update:
            statistics = LossStatistics.merge(statistics, out.statistics)
        merged.append(statistics)
    everything = [batch for update in updates for batch in update]
    entropy_sum = sum((torch.from_numpy(_own(entropies, b)).sum() for b in everything), torch.zeros(()).double())
    weights = [out.weights_T for out in outs[-1]]
    samples = gather_weights(best_and_worst(rollout, plan[-1]), rollout, updates[-1], weights, replicas)
    return {
        "metrics": {
            **rollout_metrics(rollout),
            **policy_metrics(everything, entropy_sum, CONFIG, replicas),
            **staleness(rollout, VERSION, replicas),
            **loss_metrics(reduce_statistics(merged, replicas), [1.0, 2.0, 6.0], LossConfig(CONFIG)),
            **Efficiency(COST, 2, layout.pack_tokens, PEAK).metrics(rollout, plan, 1, TIMES),
        },
        "positions": [[len(batch.tokens_T) for batch in update] for update in updates],
        "samples": [(s.number, s.tokens.numpy(), s.response_mask.numpy(), s.weight.numpy()) for s in samples],
        "memory": peak_memory(replicas.device),
    }


def _own(function, batch: PackedBatch) -> np.ndarray:
    """Of this rank's response tokens."""
    mask = batch.response_mask_T
    return function(batch.labels_T[mask].numpy(), batch.position_ids_T[mask].numpy())


def _with_old_log_probs(batch: PackedBatch) -> PackedBatch:
    logp_T = torch.full(batch.tokens_T.shape, math.nan)
    logp_T[batch.response_mask_T] = torch.from_numpy(_own(old_log_probs, batch))
    return replace(batch, old_logp_T=logp_T)


def _loss(batch: PackedBatch, update: int, context: dist.ProcessGroup):
    logp_T = torch.full(batch.tokens_T.shape, math.nan)
    logp_T[batch.response_mask_T] = torch.from_numpy(_own(lambda t, p: log_probs(update, t, p), batch))
    assert batch.old_logp_T is not None
    return context_parallel_fipo_loss(
        logp_T, batch.old_logp_T, batch.advantage_S, batch.response_mask_T, batch.cu_seqlens_padded_S1, CONFIG, context
    )


def rank_main(rank: int, folder: str) -> None:
    """Run every layout on two ranks; each writes what it reports."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    alone = [dist.new_group([r]) for r in range(2)]
    world = {"all": dist.group.WORLD, "alone": alone[rank]}
    reports = {name: run_layout(layout, world) for name, layout in LAYOUTS.items()}
    torch.save(reports, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


# The direct computation.


@dataclass(frozen=True)
class Response:
    """float64 [response tokens and holes between them]: everything from the first response token on."""

    number: int
    update: int
    mask: np.ndarray
    d: np.ndarray
    gap: np.ndarray
    entropy: np.ndarray
    advantage: float


def kept_responses(groups: Sequence[Sequence[Sample]]) -> list[Response]:
    """The samples that are trained on, in order, each in the update that holds it."""
    responses = []
    for g in KEPT:
        rewards = np.array([np.float32(sample.reward) for sample in groups[g]], dtype=np.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for sample, advantage in zip(groups[g], advantages, strict=True):
            number = len(responses)
            start = int(sample.response_mask.argmax())
            labels, positions = sample.tokens[start:], np.arange(start, len(sample.tokens)) - 1
            old = old_log_probs(labels, positions).astype(np.float64)
            update = number * UPDATES // (len(KEPT) * GROUP_SIZE)
            d = np.clip(log_probs(update, labels, positions) - old, -20, 20)
            responses.append(
                Response(
                    number,
                    update,
                    sample.response_mask[start:],
                    d,
                    old - engine_log_probs(labels, positions),
                    entropies(labels, positions),
                    advantage,
                )  # fmt: skip
            )
    return responses


def influence(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """(f, exp(F)) of each token."""
    c, gamma, future, raw = CONFIG.dual_clip, 2 ** (-1 / CONFIG.half_life), 0.0, np.empty(len(response.d))
    for t in reversed(range(len(response.d))):
        x = response.d[t] if response.mask[t] and response.d[t] <= math.log(c) else 0.0
        future = x + gamma * future
        raw[t] = math.exp(future)
    f = np.clip(raw, CONFIG.weight_low, CONFIG.weight_high)
    reset = (response.advantage < 0) & (np.exp(response.d) > CONFIG.safety_threshold)
    return np.where(reset, np.clip(f, 0.8, 1.0), f), raw


def loss_numbers(responses: Sequence[Response]) -> dict[str, float]:
    """The 28 metrics of the released code but for entropy and gradient norm, the active fraction, mean advantages."""
    c, loss_sum, loss_tokens = CONFIG.dual_clip, 0.0, 0
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("d", "f", "raw", "a")}
    for response in responses:
        f, raw = influence(response)
        m, a = response.mask, response.advantage
        values = {"d": response.d, "f": f, "raw": raw, "a": np.full(len(f), a)}
        for name, value in values.items():
            columns[name].append(value[m])
        r = np.exp(response.d)
        loss = np.maximum(-a * f * r, -a * f * np.clip(r, 1 - CONFIG.clip_low, 1 + CONFIG.clip_high))
        loss = np.minimum(loss, -a * f * c) if a < 0 else loss
        if not (a < 0 and (m & (r > c)).sum() > 1):
            loss_sum += loss[m].sum()
            loss_tokens += m.sum()
    d, f, raw, a = (np.concatenate(columns[name]) for name in ("d", "f", "raw", "a"))
    r, n = np.exp(d), len(d)
    negative, positive = r[a < 0], r[a > 0]
    values = {
        "influence_weights_mean": f.mean(), "influence_weights_min": f.min(), "influence_weights_max": f.max(),
        "influence_weights_mean_raw": raw.mean(),
        "raw_influence_weights_min": raw.min(), "raw_influence_weights_max": raw.max(),
        "IW_upper_clip_ratio": (f >= CONFIG.weight_high).mean(), "IW_lower_clip_ratio": (f <= CONFIG.weight_low).mean(),
        "IW_overall_clip_ratio": ((f >= CONFIG.weight_high) | (f <= CONFIG.weight_low)).mean(),
        "neg_ratio_2_3": ((negative >= 2) & (negative < 3)).sum() / n,
        "neg_ratio_3_4": ((negative >= 3) & (negative < 4)).sum() / n,
        "neg_ratio_4_10": ((negative >= 4) & (negative < c)).sum() / n,
        "neg_is_max": negative.max(), "pos_is_max": positive.max(), "pos_is_min": positive.min(),
        "pos_mini_frac": (positive < 1e-3).sum() / n,
        "pg_clipfrac": ((negative < 1 - CONFIG.clip_low).sum() + (positive > 1 + CONFIG.clip_high).sum()) / n,
        "pg_clipfrac_lower": (negative > c).sum() / n,
        "ppo_kl": -d.mean(), "pg_loss": loss_sum / loss_tokens,
        **{f"neg_is_p{q[2:]}": np.quantile(negative, float(q)) for q in ("0.75", "0.995", "0.999")},
        **{f"pos_is_p{q[2:]}": np.quantile(positive, float(q)) for q in ("0.25", "0.75", "0.995", "0.999")},
        "pos_is_median": np.median(positive),
    }  # fmt: skip
    return {f"actor/{name}": float(value) for name, value in values.items()} | {
        "fipo/active_fraction": (f != 1).mean(),
        "advantage/length_weighted_mean": a.mean(),
        "advantage/length_weighted_mean_with_f": (a * f).mean(),
    }


def expected_metrics(layout: Layout, positions: Sequence[Sequence[int]]) -> dict:
    """Every metric of the step. ``positions``: of each update those of each pack, summed over the ranks sharing it."""
    groups = make_samples()
    samples = [sample for group in groups for sample in group]
    responses = kept_responses(groups)
    lengths = np.array([sample.response_mask.sum() for sample in samples], dtype=np.float64)
    correct = np.array([sample.correct for sample in samples], dtype=np.float64)
    gap = np.concatenate([response.gap[response.mask] for response in responses])
    entropy = np.concatenate([response.entropy[response.mask] for response in responses])
    cuts = np.quantile(lengths, [0.25, 0.5, 0.75])
    above = (lengths[:, None] > cuts).sum(1)
    ages = np.concatenate([
        np.repeat(VERSION - version, end - begin)
        for g in KEPT for sample in groups[g] for version, begin, end in sample.weight_versions
    ])  # fmt: skip
    numbers = {
        "reward/mean": np.mean([sample.reward for sample in samples]),
        "reward/accuracy": correct.mean(), "reward/errors": GROUPS,
        "response/length_mean": lengths.mean(), "response/length_min": lengths.min(),
        "response/length_max": lengths.max(),
        **{f"response/length_{name}": np.quantile(lengths, q)
           for name, q in (("q25", 0.25), ("median", 0.5), ("q75", 0.75))},
        "response/truncated_fraction": np.mean([sample.finish_reason == "length" for sample in samples]),
        "rollout/generated_samples": len(samples), "rollout/sampled_batches": 2,
        "rollout/kept_groups": len(KEPT), 
        "rollout/dropped_groups": sum(len({s.correct for s in groups[g]}) == 1 for g in range(GROUPS) if g not in KEPT),
        **{f"accuracy/length_q{q + 1}": correct[above == q].mean() for q in range(4)},
        "rollout/staleness_mean": ages.mean(), "rollout/staleness_max": ages.max(),
        "actor/entropy": entropy.mean(),
        "mismatch/kl": (np.exp(gap) - 1 - gap).mean(), "mismatch/rms": math.sqrt((gap**2).mean()),
        "mismatch/max": abs(gap).max(),
        **{f"mismatch/{name}": np.sort(abs(gap))[math.floor(q * (len(gap) - 1))]
           for name, q in (("median", 0.5), ("p99", 0.99), ("p999", 0.999))},
        "fipo/noise_gain": 1 / math.sqrt(1 - 4 ** (-1 / CONFIG.half_life)),
        "fipo/noise_budget": math.log(1.2) * math.sqrt(1 - 4 ** (-1 / CONFIG.half_life)),
        **loss_numbers(responses),
        "actor/grad_norm": 3.0,
        **_perf(layout, groups, positions),
    }  # fmt: skip
    numbers["updates"] = [
        loss_numbers([response for response in responses if response.update == update]) | {"actor/grad_norm": norm}
        for update, norm in enumerate((1.0, 2.0, 6.0))
    ]
    return numbers


def forward_operations(tokens: int, logits: int) -> float:
    """Of one sequence, counted matrix by matrix; ``logits`` of its tokens pass the output layer."""
    c = asdict(COST)
    h, width = c["hidden_size"], c["heads"] * c["head_dim"]
    keys = c["kv_heads"] * c["head_dim"]
    layer = 2 * tokens * (h * width + 2 * h * keys + width * h + 3 * h * c["ffn_hidden_size"])
    layer += 2 * (2 * width) * (tokens * tokens / 2)
    return c["layers"] * layer + 2 * logits * h * c["vocab_size"]


def _perf(layout: Layout, groups: Sequence[Sequence[Sample]], positions: Sequence[Sequence[int]]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group]
    kept = [sample for g in KEPT for sample in groups[g]]
    seconds, train_seconds, ranks = 6.0, 2.0, 2
    response = sum(int(sample.response_mask.sum()) for sample in samples) / seconds
    total = sum(len(sample.tokens) for sample in samples) / seconds
    forward = sum(forward_operations(len(s.tokens) - 1, int(s.response_mask.sum())) for s in kept)
    generation = sum(forward_operations(len(s.tokens) - 1, int(s.response_mask.sum())) for s in samples)
    training = 4 * forward  # one pass for old_logp, one forward and its backward of twice that
    packs = [n for update in positions for n in update]
    tokens = sum(len(s.tokens) - 1 for s in kept)
    values = {
        "response_tokens_per_second": response, "response_tokens_per_second_per_rank": response / ranks,
        "total_tokens_per_second": total, "total_tokens_per_second_per_rank": total / ranks,
        "train_tflops_per_rank": training / train_seconds / ranks / 1e12,
        "tflops_per_rank": (training + generation) / seconds / ranks / 1e12,
        "train_mfu": training / train_seconds / ranks / PEAK,
        "mfu": (training + generation) / seconds / ranks / PEAK,
        "packing_efficiency": tokens / sum(max(layout.pack_tokens, n) for n in packs),
        "padding_fraction": 1 - tokens / sum(packs),
    }  # fmt: skip
    return {f"perf/{name}": value for name, value in values.items()}

"""Which curves a report shows, and from which keys of metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_fipo.observe.run_data import RunData
from megatron_fipo.observe.statistics import wilson_interval
from megatron_fipo.observe.svg import Band, Chart, Line

COLORS = 8  # `--c0` ... `--c7` of the page

PHASES = ("rollout", "old_logp", "reference", "update", "eval", "checkpoint")  # order of the stack


@dataclass(frozen=True)
class Curves:
    """A chart of plain keys: {key: name}. A comparison of runs draws the first key only, one line per run."""

    title: str
    note: str
    keys: Mapping[str, str]
    unit: str = ""
    from_zero: bool = True

    def __call__(self, runs: Sequence[RunData]) -> Chart:
        note = self.note
        if len(runs) == 1:
            series = ((name, runs[0].series(key)) for key, name in self.keys.items() if runs[0].values(key))
            lines = [Line(name, *points, color=i % COLORS) for i, (name, points) in enumerate(series)]
        else:
            first, name = next(iter(self.keys.items()))
            lines = _overlay(runs, first)
            note = f"{name}, {note}" if len(self.keys) > 1 else note
        return Chart(self.title, note, self.unit, from_zero=self.from_zero, lines=lines)


def charts(runs: Sequence[RunData]) -> list[Chart]:
    """All charts that the runs have data for: details of one run, or one curve per run in a comparison."""
    return [chart for chart in (make(runs) for make in PAGE) if _has_data(chart)]


def _has_data(chart: Chart) -> bool:
    values = [y for line in chart.lines for y in line.y] + [y for band in chart.bands for y in band.high]
    return any(y is not None for y in values)


def _overlay(runs: Sequence[RunData], key: str) -> list[Line]:
    return [Line(run.name, *run.series(key), color=i % COLORS) for i, run in enumerate(runs) if run.values(key)]


def _accuracy(runs: Sequence[RunData]) -> Chart:
    """Evaluations as points with their intervals; of a single run also greedy decoding and the training samples."""
    if len(runs) > 1:
        lines = [
            _evaluation_line(run, run.evaluation_names[0], "accuracy", run.name, i % COLORS)
            for i, run in enumerate(runs)
            if run.evaluation_names
        ]
        return Chart("Accuracy", "held-out, sampled; bars are 95 % intervals", "%", from_zero=True, lines=lines)
    run = runs[0]
    lines = [Line("training samples", *run.series("reward/accuracy"), color=COLORS - 1)]
    for i, name in enumerate(run.evaluation_names):
        lines.append(_evaluation_line(run, name, "accuracy", f"{name}, sampled", 2 * i % COLORS))
        lines.append(_evaluation_line(run, name, "greedy_accuracy", f"{name}, greedy", (2 * i + 1) % COLORS))
    lines = [line for line in lines if line.x]
    return Chart("Accuracy", "bars are 95 % intervals", "%", from_zero=True, lines=lines)


def _evaluation_line(run: RunData, name: str, kind: str, label: str, color: int) -> Line:
    rows = [row for row in run.rows if row.get(f"eval/{name}/{kind}") is not None]
    values = [row[f"eval/{name}/{kind}"] for row in rows]
    intervals = [wilson_interval(value, int(row[f"eval/{name}/n"])) for row, value in zip(rows, values, strict=True)]
    return Line(label, [row["step"] for row in rows], values, color, markers=True, interval=intervals)


def _length(runs: Sequence[RunData]) -> Chart:
    lines = _overlay(runs, "response/length_mean")
    bands = []
    if len(runs) == 1:
        run = runs[0]
        lines = [Line("mean", line.x, line.y) for line in lines]
        if run.values("response/length_q25"):
            x, low = run.series("response/length_q25")
            bands.append(Band("25 to 75 % of responses", x, low, run.series("response/length_q75")[1]))
    return Chart("Response length", "tokens, all generated samples", "tokens", from_zero=True, lines=lines, bands=bands)


def _active_by_update(runs: Sequence[RunData]) -> Chart:
    """Active fraction of the first, second, ... update of a rollout; the first is 0 by construction."""
    lines = []
    for i, run in enumerate(runs):
        by_update: dict[int, list[float]] = {}
        for row in run.rows:
            for index, update in enumerate(row.get("updates", ()), start=1):
                if update.get("fipo/active_fraction") is not None:
                    by_update.setdefault(index, []).append(update["fipo/active_fraction"])
        if by_update:
            name = run.name if len(runs) > 1 else "active fraction"
            means = [fmean(by_update[index]) for index in sorted(by_update)]
            lines.append(Line(name, sorted(by_update), means, i % COLORS, markers=True))
    note = "by update, mean over steps; 0 in the first by construction"
    return Chart("Active fraction within a step", note, "%", x_title="update", from_zero=True, lines=lines)


def _phase_times(runs: Sequence[RunData]) -> Chart:
    """Stacked seconds per phase, what no phase covers as "other"; the step's total in a comparison."""
    if len(runs) > 1:
        return Chart("Step time", "", "s", from_zero=True, lines=_overlay(runs, "time/step"))
    rows = [row for row in runs[0].rows if row.get("time/step") is not None]
    x = [row["step"] for row in rows]
    named = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")} - {"step"}
    phases = [phase for phase in PHASES if phase in named] + sorted(named - set(PHASES))
    bands, below = [], [0.0] * len(rows)
    for i, phase in enumerate(phases):
        above = [base + (row.get(f"time/{phase}") or 0.0) for base, row in zip(below, rows, strict=True)]
        bands.append(Band(phase, x, below, above, i % COLORS, stacked=True))
        below = above
    total = [max(base, row["time/step"]) for base, row in zip(below, rows, strict=True)]
    if rows:
        bands.append(Band("other", x, below, total, COLORS - 1, stacked=True))
    return Chart("Step time by phase", "seconds", "s", from_zero=True, bands=bands)


PAGE: tuple[Callable[[Sequence[RunData]], Chart], ...] = (
    _accuracy,
    Curves("Reward", "mean over all generated samples", {"reward/mean": "reward"}, from_zero=False),
    _length,
    Curves(
        "Accuracy by length",
        "of generated samples, by quarters of response length",
        {
            "accuracy/length_q1": "shortest",
            "accuracy/length_q2": "second",
            "accuracy/length_q3": "third",
            "accuracy/length_q4": "longest",
        },
        "%",
    ),
    Curves("Truncated responses", "cut at the length limit", {"response/truncated_fraction": "truncated"}, "%"),
    Curves("Entropy", "of the policy, nats per response token", {"actor/entropy": "entropy"}),
    Curves("Policy KL", "mean of log π_old − log π over the updates", {"actor/ppo_kl": "KL"}, from_zero=False),
    Curves("Active fraction", "response tokens with f ≠ 1", {"fipo/active_fraction": "active fraction"}, "%"),
    _active_by_update,
    Curves(
        "Influence weight f",
        "mean over response tokens, after clipping",
        {"actor/influence_weights_mean": "f"},
        from_zero=False,
    ),
    Curves(
        "Influence weights at a bound",
        "share of response tokens",
        {
            "actor/IW_overall_clip_ratio": "either",
            "actor/IW_upper_clip_ratio": "upper",
            "actor/IW_lower_clip_ratio": "lower",
        },
        "%",
    ),
    Curves(
        "Clipped tokens",
        "share of response tokens",
        {"actor/pg_clipfrac": "ratio clip", "actor/pg_clipfrac_lower": "dual clip"},
        "%",
    ),
    Curves("Gradient norm", "before clipping", {"actor/grad_norm": "gradient norm"}),
    Curves("Learning rate", "", {"actor/lr": "learning rate"}),
    Curves(
        "Advantage",
        "mean over response tokens",
        {"advantage/length_weighted_mean": "A", "advantage/length_weighted_mean_with_f": "A f"},
        from_zero=False,
    ),
    Curves(
        "Engine against trainer",
        "difference of their log-probs of the sampled tokens",
        {"mismatch/rms": "rms", "mismatch/p99": "99 %", "fipo/noise_budget": "noise budget"},
    ),
    Curves(
        "Staleness",
        "versions since the weights that drew a token",
        {"rollout/staleness_mean": "mean", "rollout/staleness_max": "oldest"},
    ),
    Curves(
        "Groups",
        "kept: with right and wrong answers",
        {"rollout/kept_groups": "kept", "rollout/dropped_groups": "dropped"},
    ),
    Curves(
        "Throughput",
        "tokens per second of the whole step",
        {"perf/response_tokens_per_second": "response tokens", "perf/total_tokens_per_second": "all tokens"},
        "/s",
    ),
    Curves(
        "Operations",
        "model TFLOP/s per rank",
        {"perf/train_tflops_per_rank": "training", "perf/tflops_per_rank": "whole step"},
    ),
    Curves("Packing", "tokens as a share of the room in micro-batches", {"perf/packing_efficiency": "filled"}, "%"),
    Curves("Memory", "peak of the fullest rank", {"perf/peak_memory_gb": "memory"}, "GB"),
    _phase_times,
)

"""A dozen numbers that say how a run went, for its last words on the console and the head of its report."""

from statistics import median

from megatron_fipo.observe.run_data import RunData
from megatron_fipo.observe.svg import format_value

Number = tuple[str, str, str]
"""What it is, its value, a note."""


def overview(run: RunData) -> list[Number]:
    """The numbers beside accuracy that the run has; two with an arrow are those of the first and the last step."""
    rows = [row for row in run.rows if row["step"] > 0]
    last = rows[-1] if rows else {}
    found = [
        _change(run, "reward", "reward/mean", note="mean over generated samples"),
        _change(run, "response length", "response/length_mean", note=_spread(last)),
        _change(run, "truncated", "response/truncated_fraction", "%", note="of responses, cut at the length limit"),
        _change(run, "entropy", "actor/entropy", note="nats per token"),
        _typical(run, "policy KL", "actor/ppo_kl", note="median over steps"),
        _typical(run, "active fraction", "fipo/active_fraction", "%", note="of response tokens, f ≠ 1"),
        _typical(run, "gradient norm", "actor/grad_norm", note="median over steps"),
        _typical(run, "engine against trainer", "mismatch/rms", note=_budget(last)),
        _typical(run, "response tokens/s", "perf/response_tokens_per_second_per_rank", note="per rank"),
        _typical(run, "training TFLOP/s", "perf/train_tflops_per_rank", note=_utilization(run)),
        _typical(run, "packs filled", "perf/packing_efficiency", "%", note="tokens per room of micro-batches"),
        _largest(run, "memory", "perf/peak_memory_gb", "GB", note="peak of the fullest rank"),
    ]
    return [number for number in found if number is not None]


def _short(value: float, unit: str = "") -> str:
    """With three significant digits."""
    return format_value(float(f"{value:.3g}"), unit)


def _change(run: RunData, label: str, key: str, unit: str = "", note: str = "") -> Number | None:
    values = run.values(key)
    if not values:
        return None
    ends = dict.fromkeys(_short(value, unit) for value in (values[0], values[-1]))  # one, if they are the same
    return label, " → ".join(ends), note


def _typical(run: RunData, label: str, key: str, unit: str = "", note: str = "") -> Number | None:
    values = run.values(key)
    return (label, _short(median(values), unit), note) if values else None


def _largest(run: RunData, label: str, key: str, unit: str = "", note: str = "") -> Number | None:
    values = run.values(key)
    return (label, _short(max(values), unit), note) if values else None


def _spread(last: dict[str, float]) -> str:
    if "response/length_q25" not in last:
        return "tokens, mean"
    low, high, most = (_short(last[f"response/length_{name}"]) for name in ("q25", "q75", "max"))
    return f"tokens, mean; the last step's quartiles {low} and {high}, longest {most}"


def _budget(last: dict[str, float]) -> str:
    budget = last.get("fipo/noise_budget")
    return "rms per token" + (f", noise budget {_short(budget)}" if budget is not None else "")


def _utilization(run: RunData) -> str:
    shares = run.values("perf/train_mfu")
    return "per rank" + (f", {_short(median(shares), '%')} of the device's peak" if shares else "")

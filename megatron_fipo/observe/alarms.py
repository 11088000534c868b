"""Alarms in words: what the numbers of the last steps say that a person should look into.

Each alarm is a pure function of the steps' rows, oldest first, as metrics.jsonl holds them, so a resumed run goes on
with the history of the files. It looks at the last row with what came before it, and returns its text or None.
docs/metrics.md says what to do about each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]

HISTORY = 30
"""Rows that an alarm looks at, at most."""

RECENT = 5
"""Of these the last ones, which are compared with the median of those before."""

MIN_BASELINE = 5

# Collapse: how far above (below) its median a number counts as a spike (drop), and what is too small to matter.
LOW_CLIP_FACTOR, LOW_CLIP_FLOOR, LOW_CLIP_STEPS = 5.0, 1e-3, 2
KL_FACTOR, KL_FLOOR = 5.0, 1e-3
GRAD_NORM_FACTOR = 3.0
LENGTH_FACTOR = 0.7

INACTIVE_FRACTION, INACTIVE_STEPS = 1e-3, 3
UNEQUAL_STEPS = 2

DRIFT_STEPS, DRIFT_GROWTH, DRIFT_FLOOR = 3, 5.0, 0.2
DEFAULT_NOISE_BUDGET = 0.0375
"""For losses without influence weights: that of half-life 32 and a weight of at most 1.2."""


def collapse(rows: Sequence[Row]) -> str | None:
    """The signature of training without the mask M_k in the FIPO paper: the low-clip fraction spikes
    (``LOW_CLIP_STEPS`` times, one bad batch is none), and with it or after it KL, gradient norm or length break away.
    """
    before, recent = _split(rows)
    if len(before) < MIN_BASELINE:
        return None
    low_clip = median(_values(before, "actor/pg_clipfrac_lower") or [0.0])
    limit = max(LOW_CLIP_FLOOR, LOW_CLIP_FACTOR * low_clip)
    spikes = [i for i, row in enumerate(recent) if _value(row, "actor/pg_clipfrac_lower", 0.0) > limit]
    if len(spikes) < LOW_CLIP_STEPS:
        return None
    after = recent[spikes[0] :]
    signs = [sign for sign in (_kl_sign(before, after), _norm_sign(before, after), _length_sign(before, after)) if sign]
    if not signs:
        return None
    highest = max(_values(after, "actor/pg_clipfrac_lower"))
    return (
        f"training may be collapsing: the low-clip fraction rose from {100 * low_clip:.3g} % to {100 * highest:.3g} %, "
        f"then {' and '.join(signs)}"
    )


def _kl_sign(before: Sequence[Row], after: Sequence[Row]) -> str | None:
    key = "actor/ppo_kl"
    usual = median(abs(value) for value in _values(before, key) or [0.0])
    worst = max((abs(value) for value in _values(after, key)), default=0.0)
    risen = worst > max(KL_FLOOR, KL_FACTOR * usual)
    return f"|KL| rose from {usual:.2g} to {worst:.2g}" if risen else None


def _norm_sign(before: Sequence[Row], after: Sequence[Row]) -> str | None:
    key = "actor/grad_norm"
    usual, worst = median(_values(before, key) or [math.inf]), max(_values(after, key), default=0.0)
    return f"the gradient norm rose from {usual:.3g} to {worst:.3g}" if worst > GRAD_NORM_FACTOR * usual else None


def _length_sign(before: Sequence[Row], after: Sequence[Row]) -> str | None:
    key = "response/length_mean"
    usual, least = median(_values(before, key) or [0.0]), min(_values(after, key), default=math.inf)
    return f"the mean length fell from {usual:,.0f} to {least:,.0f} tokens" if least < LENGTH_FACTOR * usual else None


def inactive(rows: Sequence[Row]) -> str | None:
    """Influence weights that could differ from 1 (there is a noise budget) do not, in any update after the first."""
    last = rows[-INACTIVE_STEPS:]
    if len(last) < INACTIVE_STEPS or not all("fipo/noise_budget" in row for row in last):
        return None
    later = [_values(row.get("updates", ())[1:], "fipo/active_fraction") for row in last]
    if not all(fractions and fmean(fractions) < INACTIVE_FRACTION for fractions in later):
        return None  # a single update per rollout is what --allow-inactive-fipo asks for
    return (
        f"FIPO does nothing: in the last {INACTIVE_STEPS} steps fewer than {100 * INACTIVE_FRACTION:g} % of the tokens "
        "had an influence weight other than 1 after the first update"
    )


def unequal(rows: Sequence[Row]) -> str | None:
    """Influence weights differ from 1 in the first update of a rollout, whose log-probs are those of before it."""
    first = [_values(row["updates"][:1], "fipo/active_fraction") for row in rows[-UNEQUAL_STEPS:]]
    if len(first) < UNEQUAL_STEPS or not all(fractions and fractions[0] > INACTIVE_FRACTION for fractions in first):
        return None
    return (
        f"the trainer's log-probs are not reproducible: in the first update of the last {UNEQUAL_STEPS} rollouts, with "
        f"the rollout's weights, {100 * first[-1][0]:.3g} % of the tokens had an influence weight other than 1"
    )


def drift(rows: Sequence[Row]) -> str | None:
    """The log-probs of engine and trainer differ by more than the noise budget, or by a good part of it and more than
    before."""
    key = "mismatch/rms"
    last = _values(rows[-DRIFT_STEPS:], key)
    if len(last) < DRIFT_STEPS:
        return None
    budget, least = _value(rows[-1], "fipo/noise_budget", DEFAULT_NOISE_BUDGET), min(last)
    before = _values(_split(rows)[0], key)
    usual = median(before) if len(before) >= MIN_BASELINE else math.inf
    gap = f"their log-probs differ by {last[-1]:.2g} per token (rms)"
    if least > budget:
        return f"engine and trainer disagree: {gap}, more than the noise budget of {budget:.2g}"
    if least > max(DRIFT_GROWTH * usual, DRIFT_FLOOR * budget):
        return f"engine and trainer drift apart: {gap}, after {usual:.2g} before; the noise budget is {budget:.2g}"
    return None


ALARMS: Mapping[str, Callable[[Sequence[Row]], str | None]] = {
    "collapse": collapse,
    "inactive": inactive,
    "unequal": unequal,
    "drift": drift,
}


def raised(rows: Sequence[Row]) -> dict[str, str]:
    """{kind: text} of the alarms that hold at the last of ``rows``; rows of evaluations alone (step 0) are left out."""
    steps = [row for row in rows if "updates" in row][-HISTORY:]
    texts = {kind: alarm(steps) for kind, alarm in ALARMS.items()}
    return {kind: text for kind, text in texts.items() if text is not None}


def onsets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Where each alarm began, {"step", "kind", "text"}: not where a row repeats the alarm of the row before it."""
    found: list[dict[str, Any]] = []
    previous: Mapping[str, str] = {}
    for row in rows:
        alarms = row.get("alarms", {})
        found += [
            {"step": row["step"], "kind": kind, "text": text} for kind, text in alarms.items() if kind not in previous
        ]
        previous = alarms
    return found


def _split(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """(what came before, the last ``RECENT`` rows)."""
    return rows[-HISTORY:-RECENT], rows[-RECENT:]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    """Those that are there and finite; a file has null for what is not."""
    return [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _value(row: Row, key: str, default: float) -> float:
    return next(iter(_values([row], key)), default)

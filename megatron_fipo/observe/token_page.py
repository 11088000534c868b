"""Responses whose tokens are coloured by their influence weights, as HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_fipo.observe.run_data import RunData

LEVELS = 8  # of colour, on either side of f = 1
FAINTEST = 0.01  # |ln f| that gets the strongest colour if no token has more: rounding is not shown as a signal

CSS = "\n".join(
    f".{side}{level} {{ background: color-mix(in srgb, var(--c{color}) {9 * level}%, transparent); }}"
    for side, color in (("up", 1), ("down", 0))
    for level in range(1, LEVELS + 1)
)


def token_weights(run: RunData) -> str:
    """The samples of the last step that left some, or nothing."""
    samples = [sample for sample in run.samples if sample.get("when") == "step" and sample.get("pieces")]
    samples = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    if not samples:
        return ""
    logs = [math.log(f) for sample in samples for f in sample["influence"] if f]
    scale = max([FAINTEST, *map(abs, logs)])
    body = "".join(_response(sample, scale) for sample in samples)
    note = (
        f"Of the last update of step {samples[0]['step']}, the response with the highest and the one with the lowest "
        "reward. A token's influence weight f multiplies its advantage: above 1 what followed it became more likely "
        "since the rollout, below 1 less."
    )
    return f'<h2>Influence weights, token by token</h2><p class="note">{note}</p>{_legend(scale)}{body}'


def _response(sample: Mapping[str, Any], scale: float) -> str:
    verdict = "right" if sample["correct"] else "wrong"
    spans = "".join(_span(text, f, scale) for text, f in _runs(sample["pieces"], sample["influence"]))
    left_out = f' <span class="note">{sample["tokens_left_out"]:,} more</span>' if sample["tokens_left_out"] else ""
    return (
        f'<div class="response"><div class="note">reward {sample["reward"]:.3g}, '
        f'<span class="{verdict}">{verdict}</span></div><code><span class="soft">{escape(sample["prompt"])}</span>'
        f"{spans}</code>{left_out}</div>"
    )


def _runs(pieces: Sequence[str], influence: Sequence[float | None]) -> list[tuple[str, float | None]]:
    """Pieces without a weight of their own joined to one."""
    runs: list[tuple[str, float | None]] = []
    for piece, f in zip(pieces, influence, strict=True):
        if f is None and runs and runs[-1][1] is None:
            runs[-1] = runs[-1][0] + piece, None
        else:
            runs.append((piece, f))
    return runs


def _span(text: str, f: float | None, scale: float) -> str:
    if f is None:
        return f'<i title="not written by the policy">{escape(text)}</i>'
    return f'<span class="{_level(f, scale)}" title="f = {f:.4g}">{escape(text)}</span>'


def _level(f: float, scale: float) -> str:
    """Class of a token; none where f is next to 1."""
    log = math.log(f) if f > 0 else -scale
    level = min(LEVELS, round(LEVELS * abs(log) / scale))
    return f"{'up' if log > 0 else 'down'}{level}" if level else ""


def _legend(scale: float) -> str:
    shades = [("down", level) for level in range(LEVELS, 0, -1)] + [("up", level) for level in range(1, LEVELS + 1)]
    cells = "".join(f'<span class="shade {side}{level}"></span>' for side, level in shades)
    low, high = (f"<span>f = {math.exp(edge):.3g}</span>" for edge in (-scale, scale))
    return f'<div class="legend">{low}<span>{cells}</span>{high}</div>'

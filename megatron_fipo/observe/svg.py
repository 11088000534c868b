"""Line charts as inline SVG: no script, no external file, colours from the page's CSS variables `--c0` ... `--c7`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 224
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 24  # margins around the plot area
MAX_POINTS = 360  # of a drawn line, 452 pixels wide; half as many of four, a third of six or more
MAX_HOVER = 76  # strips with a tooltip, of about 6 pixels
MAX_MARKERS = 60  # of a line; beyond it its markers and intervals would run together and are left out

Values = Sequence[float | None]  # None: no value there, the line has a gap


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Values
    color: int = 0
    markers: bool = False
    interval: Sequence[tuple[float, float]] = ()  # error bar of each point


@dataclass(frozen=True)
class Band:
    """Area between two curves: a range around a line, or (`stacked`) one layer whose height is the value."""

    name: str
    x: Sequence[float]
    low: Values
    high: Values
    color: int = 0
    stacked: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    note: str = ""
    unit: str = ""  # "%" shows fractions as percent; "s", "/s", ... are put after the number in tooltips
    x_title: str = "step"
    from_zero: bool = False
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = field(default=())


def format_value(value: float, unit: str = "") -> str:
    """Up to five significant digits: 1.23e-4, 0.0123, 1.0025, 1,234, 12.3k; percent for the unit "%"."""
    if unit == "%":
        return f"{100 * value:.4g} %"
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.3g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.3g}k"
    elif size >= 1e3:
        text = f"{value:,.0f}"
    elif 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:.5g}"
    return f"{text} {unit}".strip()


def nice_ticks(low: float, high: float, count: int, *, integer: bool = False) -> list[float]:
    """About `count` round numbers whose first and last enclose [low, high]."""
    raw = (high - low) / count or 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    if integer:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def draw(chart: Chart) -> str:
    """One `<svg>` element. Raises ValueError for a chart without a single finite value."""
    xs = sorted({x for line in chart.lines for x in line.x} | {x for band in chart.bands for x in band.x})
    ys = [y for line in chart.lines for y in line.y if y is not None]
    ys += [y for band in chart.bands for curve in (band.low, band.high) for y in curve if y is not None]
    ys += [y for line in chart.lines for bounds in line.interval for y in bounds]
    if not ys:
        raise ValueError(f"chart {chart.title!r} has no value to draw")
    plot = _Plot(xs, ys, chart.from_zero)
    parts = [_axes(plot, chart)]
    parts += [_band(plot, band) for band in chart.bands]
    points = MAX_POINTS * 2 // min(6, max(2, len(chart.lines)))
    parts += [_line(plot, line, points) for line in chart.lines]
    parts += [_hover(plot, chart, x, width) for x, width in plot.hover_strips(xs)]
    label = escape(f"{chart.title} over {chart.x_title}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


class _Plot:
    """Ticks of both axes and the map from data to pixels."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], from_zero: bool) -> None:
        low, high = min(ys), max(ys)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            high = low + (abs(low) * 0.1 or 1.0)
        self.y_ticks = nice_ticks(low, high, 4)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_low, self.x_high = xs[0], max(xs[-1], xs[0] + 1)
        ticks = nice_ticks(self.x_low, self.x_high, 6, integer=True)
        self.x_ticks = [tick for tick in ticks if self.x_low <= tick <= self.x_high]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def hover_strips(self, xs: Sequence[float]) -> list[tuple[float, float]]:
        """(x, width in pixels) of the strips that react to the pointer."""
        shown = xs[:: math.ceil(len(xs) / MAX_HOVER)]
        return [(x, (WIDTH - LEFT - RIGHT) / max(1, len(shown) - 1)) for x in shown]


def _axes(plot: _Plot, chart: Chart) -> str:
    parts = []
    for tick in plot.y_ticks:
        y = plot.y(tick)
        kind = "axis" if tick == plot.y_low else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = escape(format_value(tick, "%" if chart.unit == "%" else ""))
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in plot.x_ticks:
        x = plot.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:,.0f}</text>')
    title = escape(chart.x_title)
    parts.append(f'<text class="tick" x="{LEFT - 14}" y="{bottom + 17}" text-anchor="end">{title}</text>')
    return "".join(parts)


def _line(plot: _Plot, line: Line, max_points: int) -> str:
    style = f'class="line" style="stroke:var(--c{line.color})"'
    paths = (_path(plot, x, y) for x, y in _segments(line.x, line.y, max_points))
    parts = [f'<path {style} d="{"L".join(points)}"/>' for points in paths]
    if len(line.x) > MAX_MARKERS:
        return "".join(parts)
    for x, (low, high) in zip(line.x, line.interval, strict=False):
        px, top, bottom = plot.x(x), plot.y(high), plot.y(low)
        d = f"M{px - 3:.1f} {top:.1f}h6M{px:.1f} {top:.1f}V{bottom:.1f}M{px - 3:.1f} {bottom:.1f}h6"
        parts.append(f'<path class="bar" style="stroke:var(--c{line.color})" d="{d}"/>')
    if line.markers or len(line.x) == 1:
        for x, y in zip(line.x, line.y, strict=True):
            if y is not None:
                parts.append(_dot(plot, x, y, line.color))
    return "".join(parts)


def _band(plot: _Plot, band: Band) -> str:
    complete = [None if None in pair else pair[1] for pair in zip(band.low, band.high, strict=True)]
    low_at = dict(zip(band.x, band.low, strict=True))
    parts = []
    for x, high in _segments(band.x, complete, MAX_POINTS):
        if len(x) == 1:  # a single step has no width: draw it as a short bar
            left = plot.x(x[0]) - 6
            top, bottom = plot.y(high[0]), plot.y(low_at[x[0]] or 0.0)
            d = f"M{left:.1f} {top:.1f}h12V{bottom:.1f}h-12Z"
        else:
            lower = [low_at[at] or 0.0 for at in x]
            d = f"{'L'.join(_path(plot, x, high))}L{'L'.join(_path(plot, x, lower)[::-1]).replace('M', '')}Z"
        kind = "layer" if band.stacked else "range"
        parts.append(f'<path class="{kind}" style="fill:var(--c{band.color})" d="{d}"/>')
    return "".join(parts)


def _hover(plot: _Plot, chart: Chart, x: float, width: float) -> str:
    """An invisible strip that shows a rule, the points and a tooltip while the pointer is over it."""
    texts, dots = [f"{chart.x_title} {x:,.0f}"], []
    for line in chart.lines:
        y = dict(zip(line.x, line.y, strict=True)).get(x)
        if y is not None:
            texts.append(f"{line.name}: {format_value(y, chart.unit)}")
            dots.append(_dot(plot, x, y, line.color))
    for band in chart.bands:
        low, high = dict(zip(band.x, zip(band.low, band.high, strict=True), strict=True)).get(x, (None, None))
        if low is not None and high is not None:
            span = f"{format_value(low, chart.unit)} to {format_value(high, chart.unit)}"
            texts.append(f"{band.name}: {format_value(high - low, chart.unit) if band.stacked else span}")
    px, height = plot.x(x), HEIGHT - TOP - BOTTOM
    strip = f'<rect x="{px - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"/>'
    rule = f'<line class="rule" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    tip = escape("\n".join(texts))
    return f'<g class="hover"><title>{tip}</title>{strip}<g class="mark">{rule}{"".join(dots)}</g></g>'


def _dot(plot: _Plot, x: float, y: float, color: int) -> str:
    return f'<circle class="dot{color}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>'


def _path(plot: _Plot, x: Sequence[float], y: Sequence[float]) -> list[str]:
    points = [f"{plot.x(a):.1f} {plot.y(b):.1f}" for a, b in zip(x, y, strict=True)]
    return [f"M{points[0]}", *points[1:]]


def _segments(x: Sequence[float], y: Values, max_points: int) -> list[tuple[list[float], list[float]]]:
    """Runs of points without a gap, thinned to what a screen can show."""
    runs: list[tuple[list[float], list[float]]] = [([], [])]
    for a, b in zip(x, y, strict=True):
        if b is None:
            runs.append(([], []))
        else:
            runs[-1][0].append(a)
            runs[-1][1].append(b)
    return [_thin(*run, max_points) for run in runs if run[0]]


def _thin(x: list[float], y: list[float], max_points: int) -> tuple[list[float], list[float]]:
    """Keep the lowest and the highest point of each bucket: spikes, the thing to look for, stay."""
    if len(x) <= max_points:
        return x, y
    size = math.ceil(2 * len(x) / max_points)
    keep = {0, len(x) - 1}
    for start in range(0, len(x), size):
        bucket = range(start, min(start + size, len(x)))
        keep |= {min(bucket, key=y.__getitem__), max(bucket, key=y.__getitem__)}
    kept = sorted(keep)
    return [x[i] for i in kept], [y[i] for i in kept]

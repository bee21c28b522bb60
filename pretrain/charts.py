"""Line charts as inline SVG, with the numbers beside them for a hover read-out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]
Style = Literal["line", "faint", "dots"]  # faint: behind the others, not in the read-out

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30
NUM_BINS = 500


@dataclass(frozen=True)
class Series:
    """One line: finite points in order of x. `run` picks the colour."""

    run: int
    label: str
    points: list[Point]
    style: Style = "line"


@dataclass(frozen=True)
class Chart:
    """Some series on common axes; `x_range` spans at least their points."""

    title: str
    series: list[Series]
    x_range: Point
    log: bool = False


def downsample(points: Sequence[Point], num_bins: int = NUM_BINS) -> list[Point]:
    """At most two points a bin of x, its lowest and highest, and both ends: spikes stay visible."""
    if len(points) <= 2 * num_bins:
        return list(points)
    start, width = points[0][0], (points[-1][0] - points[0][0]) / num_bins
    bins: dict[int, tuple[Point, Point]] = {}
    for point in points:
        i = min(num_bins - 1, int((point[0] - start) / width))
        low, high = bins.get(i, (point, point))
        bins[i] = (point if point[1] < low[1] else low, point if point[1] > high[1] else high)
    kept = {points[0], points[-1]}.union(*bins.values())
    return sorted(kept)


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Exponential moving average over about `span` points, without the bias towards the first ones."""
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round values (1, 2, 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * float(step), 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high]; powers alone beyond three decades."""
    multiples = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]


def short(value: float) -> str:
    """A tick label: 12k, 0.25, 3e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


class Axes:
    """Data to SVG coordinates."""

    def __init__(self, chart: Chart):
        self.x0, self.x1 = _widen(*chart.x_range)
        values = [y for series in chart.series for _, y in series.points]
        low, high = min(values), max(values)
        self.log = chart.log and low > 0
        if self.log:
            self.y0, self.y1 = low / 1.1, high * 1.1
        else:
            low, high = _widen(low, high)
            pad = 0.04 * (high - low)
            self.y0, self.y1 = (0.0 if 0 <= low <= pad else low - pad), high + pad

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.y0) / math.log(self.y1 / self.y0)
        else:
            part = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def _widen(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = 0.5 * abs(low) or 0.5
    return low - margin, high + margin


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element; colours come from the page's `--run-N` variables."""
    axes = Axes(chart)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    for value in log_ticks(axes.y0, axes.y1) if axes.log else ticks(axes.y0, axes.y1):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{short(value)}</text>')
    for value in filter(float.is_integer, ticks(axes.x0, axes.x1)):
        x = axes.x(value)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{short(value)}</text>')
    parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}">step</text>')
    parts += [_drawn(series, axes) for series in chart.series]
    parts.append(f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><g class="marks"></g></svg>')
    return "".join(parts)


def _drawn(series: Series, axes: Axes) -> str:
    placed = [(axes.x(x), axes.y(y)) for x, y in series.points]
    attributes = f'class="{series.style} run" data-run="{series.run}"'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    line = f'<path {attributes} d="{path}"/>'
    if series.style != "dots" and len(placed) > 1:
        return line
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed)
    return f'{line}<g class="dot run" data-run="{series.run}">{dots}</g>'


def hover_data(chart: Chart) -> dict[str, object]:
    """What the page's script needs to read values off the chart; faint series are left out."""
    axes = Axes(chart)
    return {
        "x": [axes.x0, axes.x1],
        "y": [axes.y0, axes.y1],
        "log": axes.log,
        "series": [
            {"run": s.run, "label": s.label, "points": [[x, float(f"{y:.6g}")] for x, y in s.points]}
            for s in chart.series
            if s.style != "faint"
        ],
    }

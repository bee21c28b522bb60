"""Histograms and the token distribution of a diagnosis, as numbers and as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from data_pipeline.doctor.diagnosis import Diagnosis
from data_pipeline.doctor.together import num_items

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
BINS = 40
RANKS = 200  # points of the token distribution


@dataclass(frozen=True)
class Histogram:
    """``counts`` [n] of values between ``edges`` [n + 1]; log: the edges grow by a factor."""

    name: str
    title: str
    unit: str
    edges: list[float]
    counts: list[int]
    log: bool

    def as_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "edges": self.edges, "counts": self.counts}


def histograms(diagnosis: Diagnosis) -> list[Histogram]:
    """Of documents, shards, pictures and captions: those there are."""
    corpus = diagnosis.corpus
    pictures = [shard.pictures for shard in diagnosis.shards if shard.pictures is not None]
    sizes = np.concatenate([np.zeros((0, 3)), *(facts.sizes for facts in pictures)])
    captions = np.concatenate([np.zeros(0), *(facts.caption_bytes for facts in pictures)])
    items = np.array([num_items(shard) for shard in diagnosis.shards])
    height, width = np.maximum(sizes[:, 1], 1), np.maximum(sizes[:, 2], 1)
    made = [
        _logarithmic("lengths", "Length of a document", "tokens", corpus.lengths, 2),
        _linear("entropies", "Entropy of a document's tokens", "nats/token", corpus.entropies),
        _logarithmic("pixels", "Size of a picture", "pixels", height * width, 2),
        _logarithmic("aspects", "Aspect of a picture", "width / height", width / height, 2**0.25),
        _logarithmic("captions", "Length of a caption", "bytes", captions, 2**0.5),
        _logarithmic("shards", "Size of a shard", "tokens, or samples with pictures", items, 2),
    ]
    return [histogram for histogram in made if sum(histogram.counts)]


def _logarithmic(name: str, title: str, unit: str, values: np.ndarray, factor: float) -> Histogram:
    values = values[values > 0]
    if not len(values):
        return Histogram(name, title, unit, [], [], True)
    low = math.floor(math.log(values.min(), factor) + 1e-9)
    high = max(low + 1, math.floor(math.log(values.max(), factor) + 1e-9) + 1)
    edges = factor ** np.arange(low, high + 1)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(places, minlength=len(edges) - 1)
    return Histogram(name, title, unit, np.round(edges, 6).tolist(), counts.tolist(), True)


def _linear(name: str, title: str, unit: str, values: np.ndarray) -> Histogram:
    values = values[np.isfinite(values)]
    if not len(values):
        return Histogram(name, title, unit, [], [], False)
    counts, edges = np.histogram(values.astype(np.float64), bins=BINS)
    return Histogram(name, title, unit, np.round(edges, 6).tolist(), counts.tolist(), False)


def token_ranks(counts: np.ndarray) -> dict[str, Any]:
    """How often tokens occur, the most frequent first.

    Returns:
        ranks: [rank from 1, occurrences] at ranks spaced by a factor; most: [id, occurrences] of the ten most frequent
        ones; used and vocabulary: numbers of ids.
    """
    order = np.argsort(-counts, kind="stable")
    used = int((counts > 0).sum())
    places = np.unique(np.geomspace(1, max(1, used), RANKS).round().astype(int)) if used else np.zeros(0, int)
    return {
        "vocabulary": len(counts),
        "used": used,
        "most": [[token, int(counts[token])] for token in order[: min(10, used)].tolist()],
        "ranks": [[rank, int(counts[order[rank - 1]])] for rank in places.tolist()],
    }


def histogram_svg(histogram: Histogram) -> str:
    """Bars; each tells its range and number when pointed at."""
    edges = [math.log2(edge) for edge in histogram.edges] if histogram.log else histogram.edges
    most = max(histogram.counts)
    parts = [_opened(histogram.title), *_y_grid(_ticks(most), most, [f"{v:,.0f}" for v in _ticks(most)])]
    marks = np.linspace(0, len(edges) - 1, min(9, len(edges))).round().astype(int).tolist()
    for at in dict.fromkeys(marks):
        parts.append(_x_label(_x(edges[at], edges[0], edges[-1]), _short(histogram.edges[at])))
    for at, count in enumerate(histogram.counts):
        left, right = _x(edges[at], edges[0], edges[-1]), _x(edges[at + 1], edges[0], edges[-1])
        top = HEIGHT - BOTTOM - count / most * (HEIGHT - TOP - BOTTOM)
        told = f"{_short(histogram.edges[at])} to {_short(histogram.edges[at + 1])} {histogram.unit}: {count:,}"
        parts.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1, right - left - 1):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(told)}</title></rect>'
        )
    return "".join([*parts, _unit(histogram.unit), "</svg>"])


def ranks_svg(ranks: Sequence[Sequence[int]]) -> str:
    """Occurrences over rank, both logarithmic: a straight line where Zipf's law holds."""
    places = [(math.log10(rank), math.log10(count)) for rank, count in ranks]
    right, top = max(places[-1][0], 0.3), max(max(y for _, y in places), 0.3)
    powers = list(range(math.floor(top) + 1))
    parts = [_opened("Occurrences of tokens by rank"), *_y_grid(powers, top, [_short(10**p) for p in powers])]
    for power in range(math.floor(right) + 1):
        parts.append(_x_label(_x(power, 0, right), _short(10**power)))
    drawn = "L".join(f"{_x(x, 0, right):.1f} {_y(y, top):.1f}" for x, y in places)
    return "".join([*parts, f'<path class="curve" d="M{drawn}"/>', _unit("rank"), "</svg>"])


def _opened(title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - value / most * (HEIGHT - TOP - BOTTOM)


def _y_grid(values: Sequence[float], most: float, labels: Sequence[str]) -> list[str]:
    parts = []
    for value, label in zip(values, labels, strict=True):
        y = _y(value, most)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
    return parts


def _x_label(x: float, text: str) -> str:
    return f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{text}</text>'


def _unit(text: str) -> str:
    return f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(text)}</text>'


def _ticks(most: int) -> list[int]:
    """Round numbers up to ``most``, about four of them."""
    step = 10 ** math.floor(math.log10(max(1, most / 4)))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 4 >= most * 0.8)
    return list(range(0, most + 1, step))


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if value >= 10 else f"{value:.3g}"

"""Charts: spikes survive, ticks are round, coordinates stay inside."""

import math
import re
from xml.etree import ElementTree

import pytest

from pretrain.charts import HEIGHT, WIDTH, Chart, Series, downsample, hover_data, log_ticks, short, smooth, svg, ticks


def test_downsampling_keeps_spikes_ends_and_order() -> None:
    points = [(float(x), math.sin(x / 900)) for x in range(1, 50_001)]
    points[31_415] = (31_416.0, 50.0)
    points[31_420] = (31_421.0, -50.0)
    kept = downsample(points, 100)
    assert len(kept) <= 202
    assert {points[0], points[-1], (31_416.0, 50.0), (31_421.0, -50.0)} <= set(kept)
    assert kept == sorted(kept) and set(kept) <= set(points)


def test_short_runs_are_drawn_whole() -> None:
    points = [(float(x), 1.0) for x in range(1000)]
    assert downsample(points) == points


def test_smoothing_has_no_start_up_bias_and_follows_a_step() -> None:
    assert smooth([(1.0, 4.0), (2.0, 4.0), (3.0, 4.0)], 9) == [(1.0, 4.0), (2.0, 4.0), (3.0, 4.0)]
    jump = smooth([(float(x), float(x > 50)) for x in range(200)], 10)
    assert jump[50][1] == 0 and 0.5 < jump[57][1] < 1 and jump[-1][1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.83, 3.11, [2.85, 2.9, 2.95, 3.0, 3.05, 3.1]),
        (0, 3e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks() -> None:
    assert log_ticks(0.4, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100, 1000])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3e-4, "3e-4"), (0.25, "0.25"), (5000, "5000"), (12_500, "12.5k"), (2e6, "2M")]
)
def test_tick_labels(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("points", [[(3.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1e-9), (9.0, 4e8)]])
@pytest.mark.parametrize("log", [False, True])
def test_any_points_give_well_formed_svg_within_its_box(points: list[tuple[float, float]], log: bool) -> None:
    chart = Chart('a "<title>&', [Series(0, "x", points, "dots")], (points[0][0], points[-1][0]), log)
    root = ElementTree.fromstring(svg(chart))
    path = next(element for element in root.iter("path")).attrib["d"]
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    assert all(0 <= x <= WIDTH for x in numbers[::2]) and all(0 <= y <= HEIGHT for y in numbers[1::2])
    assert len(list(root.iter("circle"))) == len(points)


def test_hover_leaves_faint_series_out() -> None:
    points = [(1.0, 1.23456789), (2.0, 2.0)]
    chart = Chart("c", [Series(0, "raw", points, "faint"), Series(0, "mean", points)], (1.0, 2.0))
    assert hover_data(chart)["series"] == [{"run": 0, "label": "mean", "points": [[1.0, 1.23457], [2.0, 2.0]]}]

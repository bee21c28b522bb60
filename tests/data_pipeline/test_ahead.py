"""Looking ahead changes nothing but how often something is looked for."""

from typing import NamedTuple

import numpy as np
import pytest

from data_pipeline.ahead import AHEAD, Ahead

LAST = 1000  # samples that there are


class Columns(NamedTuple):
    rows: np.ndarray
    values: np.ndarray


class Source:
    """Sample i has i % 3 entries, of value i; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def find(self, start: int, count: int) -> Columns:
        self.asked.append((start, count))
        if start + count > LAST:
            raise ValueError(f"there are {LAST} samples")
        samples = np.arange(start, start + count)
        return Columns(np.repeat(np.arange(count), samples % 3), np.repeat(samples, samples % 3))


def test_reading_on_is_equal_and_asks_seldom() -> None:
    source, fresh = Source(), Source()
    ahead = Ahead(source.find)
    for start in range(40, 860, 8):
        found, expected = ahead(start, 8), fresh.find(start, 8)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.values, expected.values)
    assert source.asked[:2] == [(40, 8), (48, AHEAD * 8)]
    assert len(source.asked) < len(fresh.asked) / 10


def test_jumps_ask_for_no_more_than_is_wanted() -> None:
    source = Source()
    ahead = Ahead(source.find)
    for start in (500, 20, 300, 301):
        np.testing.assert_array_equal(ahead(start, 2).values, Source().find(start, 2).values)
    assert source.asked == [(500, 2), (20, 2), (300, 2), (301, 2)]


def test_an_end_ahead_is_no_error_until_it_is_reached() -> None:
    ahead = Ahead(Source().find)
    for start in range(900, LAST, 20):
        np.testing.assert_array_equal(ahead(start, 20).values, Source().find(start, 20).values)
    with pytest.raises(ValueError, match="1000 samples"):
        ahead(LAST, 20)

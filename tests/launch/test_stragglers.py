"""Which paces stand out."""

import pytest

from launch.stragglers import find_stragglers


def pace(own, data=0.0, step=1.0):
    return {"own_s": own, "data_s": data, "step_s": step, "host": "h"}


@pytest.mark.parametrize(
    ("paces", "slow"),
    [
        ([pace(0.5), pace(0.5), pace(0.9)], [2]),
        ([pace(0.5), pace(0.9)], [1]),
        ([pace(0.5), pace(0.55), pace(0.6)], []),
        ([pace(0.01), pace(0.01), pace(0.05)], []),  # five times as slow, and yet no matter
        ([pace(0.9), pace(0.9), pace(0.4)], []),
        ([pace(0.9)], []),
        ([pace(None), pace(None), pace(None)], []),  # on GPUs
        ([pace(None), pace(0.5), pace(0.9)], [2]),
    ],
)
def test_ranks_that_hold_the_others_up(paces, slow):
    assert [row["rank"] for row in find_stragglers(dict(enumerate(paces)))] == slow


def test_a_reader_that_is_slow_is_told_from_a_slow_device():
    rows = find_stragglers({0: pace(0.3), 1: pace(0.9, data=0.7), 2: pace(0.3)})
    assert [(row["rank"], row["data"], row["seconds"], row["median"]) for row in rows] == [(1, True, 0.9, 0.3)]

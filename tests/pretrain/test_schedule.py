"""Schedules: end points, shapes and phases that do not fit."""

import math
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.schedule import ScheduleConfig, check_schedule, learning_rate


def rates(total: int, **settings: Any) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(schedule, step, total, 2.0) for step in range(total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_starts_above_zero_and_meets_the_peak(name: str) -> None:
    values = rates(20, name=name, warmup=4)
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    assert values[4] == 2.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_at_the_floor_and_never_climbs_after_warmup(name: str) -> None:
    values = rates(40, name=name, warmup=5, min_ratio=0.25)
    assert values[-1] == pytest.approx(0.5)
    assert values[39] > values[40]
    assert all(later <= earlier for earlier, later in pairwise(values[5:]))


def test_cosine_and_linear_pass_their_known_points() -> None:
    cosine, linear = rates(12, name="cosine", warmup=4, min_ratio=0), rates(12, name="linear", min_ratio=0)
    assert cosine[8] == pytest.approx(1.0)
    assert cosine[6] == pytest.approx(1 + math.cos(math.pi / 4))
    assert linear[3] == pytest.approx(1.5)


def test_wsd_holds_the_peak_until_the_decay() -> None:
    values = rates(100, name="wsd", warmup=10, decay=20, min_ratio=0)
    assert set(values[9:81]) == {2.0}
    assert values[90] == pytest.approx(1.0)
    sqrt = rates(100, name="wsd", warmup=10, decay=20, min_ratio=0, decay_shape="sqrt")
    assert sqrt[85] == pytest.approx(1.0)
    assert sqrt[80] == 2.0


def test_wsd_decays_over_a_tenth_of_the_run_unless_told() -> None:
    values = rates(100, name="wsd")
    assert values[90] == 2.0
    assert values[91] < 2.0


def test_constant_ignores_the_floor() -> None:
    assert set(rates(30, name="constant", min_ratio=0.1)) == {2.0}


def test_stays_at_the_floor_beyond_the_end() -> None:
    assert learning_rate(ScheduleConfig(min_ratio=0.1), 500, 100, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 11}, r"schedule.warmup is 11 steps but .* train.steps = 10"),
        ({"name": "wsd", "warmup": 6, "decay": 5}, r"schedule.warmup \(6\) \+ schedule.decay \(5\)"),
        ({"name": "linear", "decay": 5}, r"schedule.decay is 5 but schedule.name 'linear'"),
    ],
)
def test_phases_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(ScheduleConfig(**settings), 10)


def test_phases_that_just_fit_are_taken() -> None:
    check_schedule(ScheduleConfig(name="wsd", warmup=5, decay=5), 10)
    check_schedule(ScheduleConfig(warmup=10), 10)


@pytest.mark.parametrize("bad", [{"name": "cosin"}, {"warmup": -1}, {"min_ratio": 2}, {"warm_up": 3}])
def test_bad_values_and_unknown_keys_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ScheduleConfig(**bad)

"""A run that is killed again and again ends as if it had not been."""

from pathlib import Path

import pytest

from tests.checkpoints.chaos import STEPS, chaos


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_fifteen_times_has_the_weights_of_an_uninterrupted_one(tmp_path: Path, tiny_shards: Path):
    figures = chaos(tmp_path, tiny_shards, kills=15)
    assert figures.kills == 15 and figures.completed >= 1
    assert sum(count for step, count in figures.resumed_at.items() if 0 < step < STEPS) >= 3  # not all before or after

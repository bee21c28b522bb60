"""Random faults, one after another, on a real cluster; `python -m tests.launch.chaos` has more of them."""

import pytest

from tests.launch.chaos import QUIET, survive


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_faults_do_not_change_a_bit(slurm, tmp_path, tiny_shards, monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    assert len(survive(slurm, tmp_path, tiny_shards, faults=3, seed=7)) == 3

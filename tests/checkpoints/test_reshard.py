"""Any layout loads what any other saved: real engines of three families, all layouts of up to 4 processes, some of 8.

Here each layout is source and target of some pairs; every pair is run by
`python -m tests.checkpoints.resharding dense experts pictures 1 2 3 4 8`.
"""

import pytest

from tests.checkpoints.resharding import SCHEDULES, reshard

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "processes", "every", "schedules", "layouts"),
    [
        ("dense", (1, 2, 3, 4, 8), 8, SCHEDULES, 43),
        ("experts", (1, 2, 4), 8, SCHEDULES[-1:], 42),
        ("pictures", (1, 2, 4), 8, SCHEDULES[-1:], 20),
    ],
)
def test_any_layout_loads_what_any_other_saved(tmp_path, model, processes, every, schedules, layouts):
    problems, number, pairs = reshard(model, tmp_path, processes, every, schedules)
    assert problems == []
    assert number == layouts  # none is refused that was not when this was written
    assert pairs >= number * number // every

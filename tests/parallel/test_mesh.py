"""Degrees of parallelism against the number of processes."""

import pytest
import torch.distributed as dist

from parallel.mesh import SHARD_AXIS, Mesh, ParallelConfig, axes_across_nodes, resolve_degrees
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("config", "world", "inferred"),
    [
        ({}, 6, {"dp_shard": 6}),
        ({"tp": 2, "pp": 2}, 16, {"dp_shard": 4}),
        ({"dp_shard": 2, "dp_replicate": -1}, 8, {"dp_replicate": 4}),
        ({"dp_shard": 1, "cp": -1, "tp": 2}, 8, {"cp": 4}),
    ],
)
def test_one_degree_is_inferred(config, world, inferred):
    degrees = resolve_degrees(ParallelConfig(**config), world)
    assert degrees | inferred == degrees


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            {"tp": 3},
            8,
            "parallel: tp 3 need a multiple of 3 processes, but 8 run; set parallel.tp = 2, or start 6 or 9",
        ),
        (
            {"tp": 4, "dp_shard": 1},
            8,
            "tp 4 need 4 processes, but 8 run; set parallel.tp = 8, or parallel.dp_shard = -1 to infer it, or start 4",
        ),
        ({"dp_shard": 3}, 1, "parallel: dp_shard 3 need 3 processes, but 1 run; set parallel.dp_shard = 1, or start 3"),
        ({"dp_shard": -1, "tp": -1}, 8, "parallel.dp_shard and parallel.tp are both -1: only one can be inferred"),
        ({"pp": 0}, 8, "parallel.pp = 0: must be at least 1"),
        (
            {"dp_shard": 2, "cp": 3, "tp": 2, "ep": 4},
            12,
            "parallel.ep = 4 does not divide parallel.dp_shard 2 x parallel.cp 3",
        ),
    ],
)
def test_impossible_degrees_name_the_nearest_legal_choices(config, world, message):
    with pytest.raises(ValueError, match=message):
        resolve_degrees(ParallelConfig(**config), world)


@pytest.mark.parametrize(
    ("degrees", "per_node", "axes"),
    [
        ({"tp": 8}, 8, []),
        ({"tp": 16}, 8, ["tp"]),
        ({"tp": 4, "cp": 4}, 8, ["cp"]),
        ({"tp": 4, "cp": 2}, 8, []),
        ({"tp": 16}, 0, []),
    ],
)
def test_axes_that_talk_in_every_layer_should_stay_in_a_node(degrees, per_node, axes):
    whole = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1} | degrees
    assert axes_across_nodes(whole, per_node) == axes


def _coordinates() -> dict[str, list[int]]:
    mesh = Mesh({"pp": 2, "dp_replicate": 1, "dp_shard": 1, "cp": 2, "tp": 2}, "cpu")
    return {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in ("pp", SHARD_AXIS, "cp", "tp")}


def test_tp_is_innermost_and_pp_outermost():
    groups = run_ranks(_coordinates, 8)
    assert groups[0] == {"pp": [0, 4], SHARD_AXIS: [0, 2], "cp": [0, 2], "tp": [0, 1]}
    assert groups[7] == {"pp": [3, 7], SHARD_AXIS: [5, 7], "cp": [5, 7], "tp": [6, 7]}

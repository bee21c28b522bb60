"""The only mesh builder: degrees of parallelism -> one DeviceMesh that all strategies slice."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first: tp stays inside a node
SHARD_AXIS = "dp_shard_cp"  # dp_shard and cp as one: processes that share a sequence share parameters too
GRID = ("pp", "dp_replicate", SHARD_AXIS, "tp")
EXPERT_SHARD_AXIS = "dp_shard_cp_over_ep"  # what ep leaves of dp_shard x cp
EXPERT_GRID = ("pp", "dp_replicate", EXPERT_SHARD_AXIS, "ep", "tp")


class ParallelConfig(BaseModel):
    """The recipe's `[parallel]` section. Degrees multiply to the number of processes; -1 infers one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pp: int = Field(1, description="Pipeline stages, or groups of them where a process holds several")
    dp_replicate: int = Field(1, description="Replicas of the sharded model; with dp_shard > 1 this is HSDP")
    dp_shard: int = Field(-1, description="Processes that share one copy of parameters and optimizer (FSDP2)")
    cp: int = Field(1, description="Processes that share a sequence; parameters are sharded over them too")
    tp: int = Field(1, description="Processes that share each matrix, and the sequence between matrices")
    ep: int = Field(1, description="Processes that share the experts, of those of dp_shard x cp")
    expert_tp: bool = Field(True, description="Cut each expert's matrices over tp; false: whole experts, less traffic")
    reshard_after_forward: bool = Field(
        True,
        description="Free gathered parameters after a block's forward and gather again in backward; with pp they stay "
        "through the step",
    )
    cpu_offload: bool = Field(False, description="Keep sharded parameters, gradients and optimizer in host memory")
    cp_method: Literal["ulysses", "ring"] = Field(
        "ulysses", description="ulysses: all-to-all, heads are split; ring: keys and values travel, zig-zag balanced"
    )
    schedule: str = Field("1f1b", description="Pipeline schedule: gpipe, 1f1b, interleaved1f1b, zbvzerobubble, ...")
    stages_per_rank: int = Field(0, ge=0, description="Pipeline stages of a process; 0: what the schedule needs")
    stage_layers: tuple[int, ...] = Field(
        (), description="Layers of each pipeline stage; the first and the last may have none; unset: balanced by cost"
    )


def resolve_degrees(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """Degree of each axis, -1 inferred, and of ep. Raises ValueError when they cannot multiply to `world_size`, and
    when ep cannot be carved out of dp_shard x cp.
    """
    degrees = {name: getattr(config, name) for name in AXES}
    for name, degree in degrees.items():
        if degree == 0 or degree < -1:
            raise ValueError(f"parallel.{name} = {degree}: must be at least 1, or -1 to infer it")
    inferred = [name for name, degree in degrees.items() if degree == -1]
    if len(inferred) > 1:
        raise ValueError(f"parallel.{inferred[0]} and parallel.{inferred[1]} are both -1: only one can be inferred")
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if world_size % product or (not inferred and product != world_size):
        written = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree not in (1, -1))
        need = f"a multiple of {product} processes" if inferred else f"{product} processes"
        raise ValueError(
            f"parallel: {written or 'all degrees 1'} need {need}, but {world_size} run; "
            f"{_nearest(degrees, product, world_size, bool(inferred))}"
        )
    for name in inferred:
        degrees[name] = world_size // product
    shards = degrees["dp_shard"] * degrees["cp"]
    if config.ep < 1 or shards % config.ep:
        legal = [degree for degree in range(1, shards + 1) if shards % degree == 0]
        raise ValueError(
            f"parallel.ep = {config.ep} does not divide parallel.dp_shard {degrees['dp_shard']} x parallel.cp "
            f"{degrees['cp']}, of which it is a part; set it to one of {legal}, or raise parallel.dp_shard"
        )
    return degrees | {"ep": config.ep}


def _nearest(degrees: dict[str, int], product: int, world_size: int, inferred: bool) -> str:
    """The legal choices closest to what was asked for: one degree changed, or the number of processes."""
    choices = []
    for name, degree in degrees.items():
        others = product // degree if degree > 0 else 0
        if degree > 1 and others and world_size % others == 0:
            largest = world_size // others
            legal = [d for d in range(1, largest + 1) if largest % d == 0] if inferred else [largest]
            choices.append(f"parallel.{name} = {min(legal, key=lambda d: abs(d - degree))}")
    if not inferred and world_size % product == 0:
        choices.append("parallel.dp_shard = -1 to infer it")
    if inferred:
        near = sorted({max(world_size // product, 1) * product, (world_size // product + 1) * product})
    else:
        near = [product]
    choices.append(f"start {' or '.join(map(str, near))}")
    return f"set {', or '.join(choices[:-1])}, or {choices[-1]}" if choices[:-1] else choices[-1]


def axes_across_nodes(degrees: dict[str, int], per_node: int) -> list[str]:
    """Which of tp and cp, which talk within every layer, span more than one node of `per_node` processes."""
    return [
        name
        for name, inner in (("tp", degrees["tp"]), ("cp", degrees["tp"] * degrees["cp"]))
        if degrees[name] > 1 and per_node % inner
    ]


class Mesh:
    """All processes as a grid: `mesh["tp"]` and `mesh["dp_replicate", SHARD_AXIS]` are DeviceMeshes of one parent.

    Needs an initialised process group. Axes: those of `GRID`, and `cp`, the inner part of `SHARD_AXIS`. `experts` is a
    grid of its own with the axes of `EXPERT_GRID`, of which `ep` is the inner part of `SHARD_AXIS`; None without ep.
    """

    def __init__(self, degrees: dict[str, int], device_type: str):
        shards, ep = degrees["dp_shard"] * degrees["cp"], degrees.get("ep", 1)
        sizes = degrees | {SHARD_AXIS: shards, EXPERT_SHARD_AXIS: shards // ep}

        def grid(axes: tuple[str, ...]) -> DeviceMesh:
            ranks = torch.arange(dist.get_world_size()).reshape([sizes[name] for name in axes])
            groups = [_group(name, ranks.movedim(dim, -1)) for dim, name in enumerate(axes)]
            return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=axes)

        self._grid = grid(GRID)
        self.experts = grid(EXPERT_GRID) if ep > 1 else None
        # On its own, since slicing a parent along a flattened axis is on its way out of torch.
        cp = torch.arange(dist.get_world_size()).reshape(-1, degrees["cp"], degrees["tp"]).movedim(1, -1)
        self._sequence = DeviceMesh.from_group(_group("cp", cp), device_type, mesh_dim_names=("cp",))

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        return self._sequence if axes == "cp" else self._grid[axes]


Rows = tuple[tuple[int, ...], ...]
_made: dict[Any, dict[tuple[str, Rows], Any]] = {}  # the group of all processes -> those that were made beside it


def _group(axis: str, ranks: Tensor) -> Any:
    """This process's group of an axis, of which the rows of `ranks` [..., degree] are all groups. Collective.

    Made once: each has threads or a communicator of its own, and DTensor takes meshes that are equal for the same. Axes
    in which each process is alone share theirs.
    """
    rows: Rows = tuple(map(tuple, ranks.reshape(-1, ranks.shape[-1]).tolist()))
    name = axis if ranks.shape[-1] > 1 else "alone"
    if dist.group.WORLD not in _made:
        _made.clear()
        _made[dist.group.WORLD] = {}
    made = _made[dist.group.WORLD]
    if (name, rows) not in made:
        groups = [dist.new_group(row, group_desc=f"mesh_{name}") for row in rows]
        made[name, rows] = next(group for group, row in zip(groups, rows, strict=True) if dist.get_rank() in row)
    return made[name, rows]

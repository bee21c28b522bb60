"""The only mesh builder: degrees of parallelism -> one DeviceMesh that all strategies slice."""

import math

from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first: tp stays inside a node
NOT_YET = ("pp", "cp", "tp", "ep")


class ParallelConfig(BaseModel):
    """The recipe's `[parallel]` section. Degrees multiply to the number of processes; -1 infers one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pp: int = Field(1, description="Pipeline stages (not yet supported above 1)")
    dp_replicate: int = Field(1, description="Replicas of the sharded model; with dp_shard > 1 this is HSDP")
    dp_shard: int = Field(-1, description="Processes that share one copy of parameters and optimizer (FSDP2)")
    cp: int = Field(1, description="Processes that share a sequence (not yet supported above 1)")
    tp: int = Field(1, description="Processes that share each matrix (not yet supported above 1)")
    ep: int = Field(1, description="Processes that share the experts (not yet supported above 1)")
    reshard_after_forward: bool = Field(
        True, description="Free gathered parameters after a block's forward and gather again in backward"
    )


def resolve_degrees(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """Degree of each mesh axis, -1 inferred. Raises ValueError when they cannot multiply to `world_size`."""
    for name in NOT_YET:
        if getattr(config, name) != 1:
            raise ValueError(f"parallel.{name} = {getattr(config, name)}: only 1 is supported so far; set it to 1")
    degrees = {name: getattr(config, name) for name in AXES}
    for name, degree in degrees.items():
        if degree == 0 or degree < -1:
            raise ValueError(f"parallel.{name} = {degree}: must be at least 1, or -1 to infer it")
    unknown = [name for name, degree in degrees.items() if degree == -1]
    if len(unknown) > 1:
        raise ValueError(f"parallel.{unknown[0]} and parallel.{unknown[1]} are both -1: only one can be inferred")
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    written = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree != 1)
    if unknown:
        if world_size % product:
            raise ValueError(
                f"parallel: {written} cannot be spread over {world_size} processes: {world_size} is not a multiple "
                f"of {product}; change a degree or the number of processes"
            )
        degrees[unknown[0]] = world_size // product
    elif product != world_size:
        raise ValueError(
            f"parallel: {written or 'all degrees 1'} need {product} processes, but {world_size} run; set "
            f"parallel.dp_shard = -1 to infer it, or start {product}"
        )
    return degrees


def build_mesh(degrees: dict[str, int], device_type: str) -> DeviceMesh:
    """The mesh over all processes, one axis a name in AXES. Needs an initialised process group."""
    return init_device_mesh(device_type, tuple(degrees[name] for name in AXES), mesh_dim_names=AXES)

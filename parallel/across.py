"""Rows of all data-parallel processes, for losses that compare samples with each other."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from parallel.mesh import SHARD_AXIS, Mesh

Gather = Callable[[Tensor], tuple[Tensor, int]]  # own rows [n, ...] -> those of all [N, ...], index of the own first


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """Of one process."""
    return rows, 0


def over_data(mesh: Mesh | None) -> Gather:
    """Gathers rows in the order of data ranks, as many from each. In backward every process gets the gradient of its
    own rows, summed over what all processes did with them. `mesh` None: one process; cp must be 1.
    """
    if mesh is None:
        return alone
    data = mesh["dp_replicate", SHARD_AXIS]
    coordinate = data.get_coordinate()
    assert coordinate is not None
    rank = coordinate[0] * data.size(1) + coordinate[1]

    def gather(rows: Tensor) -> tuple[Tensor, int]:
        cut = DTensor.from_local(rows, data, [Shard(0), Shard(0)])
        return cut.full_tensor(grad_placements=[Partial(), Partial()]), rank * len(rows)

    return gather


def check_across(degrees: Mapping[str, int], global_batch: int, micro_batch: int) -> None:
    """Raises ValueError where a layout would not compare each sample of a step with all others."""
    for axis in ("pp", "cp"):
        if degrees[axis] > 1:
            raise ValueError(
                f"parallel.{axis} = {degrees[axis]}: an objective that compares samples with each other needs whole "
                "models and samples; set it to 1 and raise parallel.dp_shard"
            )
    ranks = degrees["dp_replicate"] * degrees["dp_shard"]
    if global_batch != micro_batch * ranks:
        raise ValueError(
            f"train.global_batch = {global_batch}, but an objective that compares samples with each other sees "
            f"those of one micro-batch of all data ranks: {micro_batch} x {ranks} = {micro_batch * ranks}; make them "
            "equal"
        )

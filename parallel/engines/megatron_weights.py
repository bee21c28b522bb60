"""Megatron's tensors as ours and back, by a family's table, one tensor at a time."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.engines.megatron_facts import Layout, MegatronFacts, Row
from parallel.materialise import generator_for
from parallel.mesh import EXPERT_SHARD_AXIS, SHARD_AXIS, Mesh

Values = Callable[[Tensor], Tensor]  # of one of Megatron's tensors -> something of its shape: itself, a gradient


@dataclass(frozen=True, eq=False)
class Entry:
    """Tensors of Megatron's that together hold some of ours: one, or of a stack each expert's.

    ours: their names -> shapes of the whole. groups: key/value heads in this process's part, head: their width.
    """

    tensors: list[Tensor]
    ours: dict[str, torch.Size]
    layout: Layout
    stacked: bool
    groups: int
    head: int

    def split(self, values: Values) -> dict[str, Tensor]:
        """This process's part of each of ours: views where the layout allows, else copies."""
        columns = [self._split(values(tensor)) for tensor in self.tensors]
        if not self.stacked:
            return dict(zip(self.ours, columns[0], strict=True))
        return {name: torch.stack(parts) for name, parts in zip(self.ours, zip(*columns, strict=True), strict=True)}

    def fill(self, values: Values, parts: Mapping[str, Tensor]) -> None:
        """The reverse, in place."""
        for index, tensor in enumerate(self.tensors):
            own = [parts[name][index] if self.stacked else parts[name] for name in self.ours]
            values(tensor).copy_(self._join(own))

    @property
    def cut(self) -> bool:
        """Whether tensor parallelism leaves this process a part of each matrix."""
        matrices = [whole[1:] if self.stacked else whole for whole in self.ours.values()]
        return sum(shape.numel() for shape in matrices) != self.tensors[0].numel()

    def _split(self, value: Tensor) -> tuple[Tensor, ...]:
        if self.layout != "groups":
            return value.chunk(len(self.ours))
        heads = value.unflatten(0, (self.groups, -1))
        sizes = [heads.shape[1] - 2 * self.head, self.head, self.head]
        return tuple(part.flatten(0, 1) for part in heads.split(sizes, dim=1))

    def _join(self, parts: list[Tensor]) -> Tensor:
        if self.layout != "groups":
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)


def entries_of(
    model: nn.Module, layers: range, facts: MegatronFacts, shapes: Mapping[str, torch.Size], tp: int
) -> Iterator[Entry]:
    """Of all tensors of a chunk, whose layers are numbered `layers` in the whole model. shapes: of all of ours."""
    stacks: dict[tuple[int, str], list[Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        own = found[2] if found else name
        prefix = f"{facts.layers}.{layers[int(found[1])]}." if found else ""
        row, names = _find(facts.block if found else facts.ends, re.sub(r"local_experts\.\d+", "local_experts.*", own))
        whole = {prefix + ours: shapes[prefix + ours] for ours in names}
        key = (id(model), prefix + names[0])
        first = key not in stacks
        stacks.setdefault(key, []).append(tensor)
        if first:
            heads = int(facts.arguments["kv_channels"])
            yield Entry(stacks[key], whole, row.layout, row.stacked, max(facts.kv_heads // tp, 1), heads)


def _find(table: Mapping[str, Row], name: str) -> tuple[Row, tuple[str, ...]]:
    """The row of a tensor of Megatron's, and ours: rows name tensors, or modules whose tensors are called alike."""
    if name in table:
        return table[name], table[name].ours
    module, _, kind = name.rpartition(".")
    assert module in table, f"no row of the table has {name}"
    return table[module], tuple(f"{ours}.{kind}" for ours in table[module].ours)


@dataclass(frozen=True)
class Places:
    """Where this process's parts of ours stand in the whole. mesh: None for one process; ep: degree."""

    mesh: Mesh | None
    ep: int

    def wrap(self, entry: Entry, name: str, part: Tensor, shared: bool = False) -> Tensor:
        """As a DTensor where it is a part; itself where it is the whole. shared: of a part that all data ranks have,
        each keeps a slice, along a dim that they divide.
        """
        whole = entry.ours[name]
        mesh, placements = self._place(entry, whole, part.shape)
        if shared:
            mesh, placements, part = self._share(entry, whole, part, placements)
        if mesh is None:
            return part
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole, stride=stride)

    def part(self, tensor: Tensor) -> Tensor:
        """What `wrap` was given. Collective where data ranks share it."""
        if not isinstance(tensor, DTensor):
            return tensor
        names = tensor.device_mesh.mesh_dim_names or ()
        placements = [
            Replicate() if axis in (SHARD_AXIS, EXPERT_SHARD_AXIS) else place
            for axis, place in zip(names, tensor.placements, strict=True)
        ]
        return tensor.redistribute(placements=placements).to_local()

    def _share(
        self, entry: Entry, whole: torch.Size, part: Tensor, placements: list[Placement]
    ) -> tuple[DeviceMesh | None, list[Placement], Tensor]:
        assert self.mesh is not None
        if entry.stacked and self.ep > 1:
            assert self.mesh.experts is not None
            mesh = self.mesh.experts[EXPERT_SHARD_AXIS, "ep", "tp"]
        else:
            mesh = self.mesh[SHARD_AXIS, "tp"]
        placements = placements or [Replicate()]
        ranks, rank = mesh.size(0), mesh.get_local_rank(0)
        free = [dim for dim in range(part.ndim) if part.shape[dim] == whole[dim] and whole[dim] % ranks == 0]
        if not free:
            return mesh, [Replicate(), *placements], part
        own = part.chunk(ranks, free[0])[rank].contiguous()
        return mesh, [Shard(free[0]), *placements], own

    def numbers(self, entry: Entry) -> list[int]:
        """Of the experts of a stack that are here."""
        count = len(entry.tensors)
        assert entry.stacked
        first = count * self.mesh.experts["ep"].get_local_rank() if self.mesh and self.mesh.experts is not None else 0
        return list(range(first, first + count))

    def cut(self, matrix: Tensor, like: torch.Size) -> Tensor:
        """This process's part, of shape `like`, of a whole matrix."""
        for dim, (whole, own) in enumerate(zip(matrix.shape, like, strict=True)):
            if whole != own:
                assert self.mesh is not None
                return matrix.narrow(dim, own * self.mesh["tp"].get_local_rank(), own)
        return matrix

    def _place(self, entry: Entry, whole: torch.Size, own: torch.Size) -> tuple[DeviceMesh | None, list[Placement]]:
        of_matrix = [dim for dim in range(entry.stacked, len(whole)) if whole[dim] != own[dim]]
        over_tp: Placement = Shard(of_matrix[0]) if of_matrix else Replicate()
        if entry.stacked and self.ep > 1:
            assert self.mesh is not None and self.mesh.experts is not None
            return self.mesh.experts["ep", "tp"], [Shard(0), over_tp]
        if not of_matrix:
            return None, []
        assert self.mesh is not None
        return self.mesh["tp"], [over_tp]


@torch.no_grad()
def initialise_weights(
    entries: Iterable[Entry], places: Places, init: Callable[..., None], seed: int, tied: Mapping[str, str]
) -> None:
    """As `parallel.materialise.init_parameters`: every value a function of the seed and our name."""
    for entry in entries:
        parts = entry.split(lambda tensor: tensor)
        for own_name, whole in entry.ours.items():
            name, like = tied.get(own_name, own_name), parts[own_name].shape

            def draw(name: str, drawn: str, shape: torch.Size, like: torch.Size) -> Tensor:
                full = torch.empty(shape)  # fp32 values, whatever precision they are then kept in
                init(name, full, generator_for(seed, drawn))
                return places.cut(full, like)

            if entry.stacked:
                experts = [draw(name, f"{name}.{n}", whole[1:], like[1:]) for n in places.numbers(entry)]
                parts[own_name] = torch.stack(experts)
            else:
                parts[own_name] = draw(name, name, whole, like)
        entry.fill(lambda tensor: tensor, parts)

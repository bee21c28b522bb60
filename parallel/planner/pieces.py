"""Which part of each parameter a process has: exactly, for this project's own program.

Tensor and expert parallelism cut as `parallel.tensor` and `parallel.expert` place parameters, FSDP2 what is left as
`parallel.fsdp` chooses the dim, into ceil(size / processes), and the pipeline as its stages say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from parallel.planner.layout import Layout, Part, Setting
from parallel.planner.shape import ModelShape, Parameter

ROWS_CUT = ("column", "part_column", "vocabulary", "head", "width_norm")


@dataclass(frozen=True)
class Degrees:
    """Of a layout, what parameters are cut by. kv_heads: of the model."""

    tp: int
    ep: int
    expert_tp: bool
    shards: int
    kv_heads: int

    def shards_of(self, parameter: Parameter) -> int:
        """Processes over which FSDP cuts it."""
        return max(1, self.shards // self.ep) if parameter.experts else self.shards


def degrees_of(setting: Setting) -> Degrees:
    return layout_degrees(setting.layout, setting.shape.kv_heads)


def layout_degrees(layout: Layout, kv_heads: int) -> Degrees:
    return Degrees(layout.tp, layout.ep, layout.expert_tp, layout.shards, kv_heads)


def cuts(parameter: Parameter, degrees: Degrees) -> list[int]:
    """Into how many pieces tensor and expert parallelism cut each dim."""
    found = [1] * len(parameter.shape)
    if parameter.experts:
        found[0] = degrees.ep
        if degrees.expert_tp:
            found[2 if parameter.name.endswith(".down") else 1] = degrees.tp
    elif parameter.style == "row":
        found[1:2] = [degrees.tp] * len(found[1:2])  # a bias is whole everywhere
    elif parameter.style in ROWS_CUT or (parameter.style == "key_value" and degrees.kv_heads % degrees.tp == 0):
        found[0] = degrees.tp
    return found


def is_partial(parameter: Parameter, degrees: Degrees) -> bool:
    """Whether all processes of tensor parallelism have it and see a part of what it works on, so that their gradients
    are to be summed. The bias of a row-cut matrix is not: its gradient is made of whole rows."""
    if degrees.tp == 1 or parameter.style == "row":
        return False
    return not degrees.expert_tp if parameter.experts else prod(cuts(parameter, degrees)) == 1


def shard_dim(parameter: Parameter, degrees: Degrees) -> int | None:
    """The dim that FSDP cuts; None where the pieces of another axis cannot be cut evenly, which it refuses."""
    cut, processes = cuts(parameter, degrees), degrees.shards_of(parameter)
    if processes == 1 or (cut[0] == 1 and len(cut) < 3):
        return 0
    for dim, (size, pieces) in enumerate(zip(parameter.shape, cut, strict=True)):
        if size % (pieces * processes) == 0:
            return dim
    return 0 if cut[0] == 1 else None


def piece(size: int, pieces: int, index: int) -> int:
    """Length of piece `index` when `size` is cut as torch.chunk does."""
    each = ceil(size / pieces)
    return max(0, min(each, size - index * each))


def local_elements(parameter: Parameter, degrees: Degrees, tp_rank: int = 0, shard_rank: int = 0) -> int:
    """Elements that process `tp_rank` of tensor parallelism and `shard_rank` of dp_shard x cp has."""
    ep_rank, index = (shard_rank % degrees.ep, shard_rank // degrees.ep) if parameter.experts else (0, shard_rank)
    dims = list(parameter.shape)
    for dim, pieces in enumerate(cuts(parameter, degrees)):
        if pieces > 1:
            dims[dim] = piece(dims[dim], pieces, ep_rank if parameter.experts and dim == 0 else tp_rank)
    where = shard_dim(parameter, degrees) or 0
    dims[where] = piece(dims[where], degrees.shards_of(parameter), index)
    return prod(dims)


@dataclass(frozen=True)
class Held:
    """Elements that one process has of some parameters. whole: after tensor and expert parallelism, before they are cut
    over data; experts: those of them that belong to experts; cut: after that, the largest piece; matrices: those of
    `cut` in matrices of layers; gathered: what all pieces, filled up to the largest, come to."""

    whole: float = 0.0
    experts: float = 0.0
    cut: float = 0.0
    matrices: float = 0.0
    gathered: float = 0.0

    def times(self, factor: float) -> "Held":
        return Held(*(factor * value for value in self.values))

    def __add__(self, other: "Held") -> "Held":
        return Held(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        return self.whole, self.experts, self.cut, self.matrices, self.gathered


@lru_cache(maxsize=1 << 12)
def held(parameters: tuple[Parameter, ...], degrees: Degrees, in_layers: bool) -> Held:
    """in_layers: whether they are parameters of layers, whose matrices count as such."""
    total = Held()
    for p in parameters:
        whole, cut = p.elements / prod(cuts(p, degrees)), local_elements(p, degrees)
        matrix = cut if in_layers and len(p.shape) > 1 else 0
        total += Held(whole, whole if p.experts else 0.0, cut, matrix, cut * degrees.shards_of(p))
    return total


def held_by(setting: Setting, part: Part) -> Held:
    """All parameters of a process of `part`."""
    total = held_ends(setting, part)
    for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
        total += held(layer.parameters, degrees_of(setting), True).times(count)
    return total


def small_elements(setting: Setting, part: Part) -> float:
    """Elements of the parameters that stay gathered because they have so few."""
    most = setting.program.persistent
    own = stage_parameters(setting.shape, (), part.first, part.last, setting.layout.pp)
    for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
        own += layer.parameters * count
    return float(sum(p.elements for p in own if p.elements <= most))


def held_ends(setting: Setting, part: Part) -> Held:
    """What the processes of the first and of the last stage have beside layers."""
    ends = stage_parameters(setting.shape, (), part.first, part.last, setting.layout.pp)
    return held(tuple(ends), degrees_of(setting), False)


def stage_parameters(shape: ModelShape, layers: Iterable[int], first: bool, last: bool, pp: int) -> list[Parameter]:
    """Parameters of a pipeline stage; a tied head in another stage than the embedding is a parameter of its own."""
    found = [p for layer in layers for p in shape.layers[layer].parameters]
    found += shape.first if first else ()
    found += (p for p in shape.last if not (pp == 1 and shape.tied and p.style == "head")) if last else ()
    return found

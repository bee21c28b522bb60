"""Upcycling and pruning of sharded checkpoints, one tensor at a time.

Memory: about that of a layer's feed-forward weights, or of its largest stack of experts where copies get noise.
Shape letters: H hidden, F width of the dense layer, E experts, f width of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.manifest import Origin, Progress
from checkpoints.surgery.methods import METHODS, PARTITIONS, copies, noisy_copies, parts
from checkpoints.surgery.target import Draw, Target, check_sources, write_tensors
from checkpoints.tensors import open_checkpoint

Fill = Callable[[str, Tensor], None]  # name, tensor: its initial value


@dataclass(frozen=True)
class SparseLayer:
    """Names of a layer's tensors. dense: gate, up [F, H], down [H, F]; experts: gate, up [E, f, H], down [E, H, f],
    which take their place; router [E, H]; bias [E], where the model has one.
    """

    dense: tuple[str, str, str]
    experts: tuple[str, str, str]
    router: str
    bias: str

    @property
    def by_expert(self) -> tuple[str, ...]:
        """Those with a row for each expert."""
        return (*self.experts, self.router, self.bias)


@dataclass(frozen=True)
class Upcycling:
    """method: of METHODS. noise, share: of `noisy_copies`, for copies. zero_router: its weights start at 0."""

    method: str = "copy"
    noise: float = 0.0
    share: float = 1.0
    zero_router: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method} is unknown: one of {', '.join(METHODS)}")
        if self.noise < 0:
            raise ValueError(f"--noise {self.noise}: must be at least 0, in standard deviations of each tensor")
        if not 0 < self.share <= 1:
            raise ValueError(f"--noise-share {self.share}: must be above 0 and at most 1")
        if self.method != "copy" and self.noise:
            raise ValueError(f"--noise {self.noise} is for --method copy: parts differ already")

    def width(self, ffn: int, experts: int) -> int:
        """Of an expert. Raises ValueError where a layer of width `ffn` cannot be cut."""
        if self.method == "copy":
            return ffn
        if ffn % experts:
            raise ValueError(
                f"--method {self.method}: model.ffn = {ffn} cannot be cut into model.moe.experts = {experts} equal "
                "parts; choose a number of experts that divides it, or --method copy"
            )
        return ffn // experts


def upcycle(
    source: Path,
    target: Target,
    layers: Sequence[SparseLayer],
    how: Upcycling,
    fill: Fill,
    draw: Draw,
    lineage: tuple[Origin, ...],
    progress: Progress | None = None,
) -> None:
    """Write a dense checkpoint as one of step 0 whose `layers` have experts, without optimizer state.

    fill: gives routers and their biases their values. draw: gives everything else random its generator.
    Raises FileNotFoundError or ValueError (one line): `source` is not whole, or does not fit.
    """
    files = open_checkpoint(source)
    stacks = {name: (layer, place) for layer in layers for place, name in enumerate(layer.experts)}
    routers = {layer.router for layer in layers}
    new = routers | {layer.bias for layer in layers}
    of = {name: stacks[name][0].dense[stacks[name][1]] if name in stacks else name for name in target.shapes}
    check_sources(files, [name for name in target.shapes if name not in new], of)
    dtypes = {name: torch.float32 if name in new else files.infos[of[name]].dtype for name in target.shapes}
    order: dict[str, Tensor] = {}  # gate's name -> the units' order, of the layer at hand

    def make(name: str) -> Tensor:
        if name in new:
            tensor = torch.zeros(target.shapes[name])
            if not (how.zero_router and name in routers):
                fill(name, tensor)
            return tensor
        if name not in stacks:
            return files.read(name)
        layer, place = stacks[name]
        experts = target.shapes[name][0]
        if how.method == "copy":
            dense = files.read(of[name])
            return (
                noisy_copies(dense, experts, how.noise, how.share, draw(name)) if how.noise else copies(dense, experts)
            )
        gate, up, _ = layer.dense
        if gate not in order:
            order.clear()
            order[gate] = PARTITIONS[how.method](files.read(gate), files.read(up), experts, draw(gate))
        return parts(files.read(of[name]), order[gate], experts, dim=int(place == 2))

    write_tensors(target, dtypes, make, lineage, progress)


def prune(
    source: Path,
    target: Target,
    layers: Sequence[SparseLayer],
    keep: Sequence[Sequence[int]],
    lineage: tuple[Origin, ...],
    progress: Progress | None = None,
) -> None:
    """Write a sparse checkpoint as one of step 0 with fewer experts, without optimizer state.

    keep: for each of `layers` the numbers of its experts that stay, in their new order. Raises as `upcycle`.
    """
    files = open_checkpoint(source)
    rows = {name: torch.tensor(kept) for layer, kept in zip(layers, keep, strict=True) for name in layer.by_expert}
    check_sources(files, list(target.shapes), {name: name for name in target.shapes})
    dtypes = {name: files.infos[name].dtype for name in target.shapes}

    def make(name: str) -> Tensor:
        tensor = files.read(name)
        return tensor.index_select(0, rows[name]) if name in rows else tensor

    write_tensors(target, dtypes, make, lineage, progress)


def largest(usage: Tensor, count: int, groups: int = 1) -> list[int]:
    """Numbers of the `count` experts with the largest usage [E], ascending; equally many of each group of neighbours.
    Among equals the first ones.
    """
    size = len(usage) // groups
    best = usage.view(groups, size).argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return sorted((best + size * torch.arange(groups)[:, None]).flatten().tolist())


def router_norms(source: Path, layers: Sequence[SparseLayer]) -> list[Tensor]:
    """Norm of each expert's row in the router [E], for each layer."""
    files = open_checkpoint(source)
    return [files.read(layer.router).float().norm(dim=1) for layer in layers]

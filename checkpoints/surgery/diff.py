"""How far two checkpoints are apart, tensor by tensor."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.manifest import Progress
from checkpoints.surgery.arithmetic import Products
from checkpoints.tensors import TensorFiles, as_bytes, open_checkpoint


@dataclass(frozen=True)
class Change:
    """Of one tensor, from checkpoint a to b. equal: bit for bit, type too."""

    part: str  # "model" or "optimizer"
    name: str
    products: Products
    equal: bool


@dataclass(frozen=True)
class Difference:
    """changes: of tensors in both, largest relative change first. unlike: of another shape or kind, one line each."""

    changes: list[Change]
    unlike: list[str]
    only_a: list[str]
    only_b: list[str]

    @property
    def equal(self) -> bool:
        return not (self.unlike or self.only_a or self.only_b) and all(change.equal for change in self.changes)

    def total(self, part: str) -> Products:
        """All tensors of a part as one."""
        return sum((change.products for change in self.changes if change.part == part), Products())


def diff(a: Path, b: Path, *, optimizer: bool = False, progress: Progress | None = None) -> Difference:
    """Compare the checkpoints in two folders, their model and, if asked, the optimizer's state; two tensors in memory.

    progress: called with the bytes just compared, of those of `a`. Raises FileNotFoundError or ValueError: one of them
    is not whole.
    """
    changes: list[Change] = []
    unlike: list[str] = []
    only: tuple[list[str], list[str]] = ([], [])
    for part in ("model", "optimizer") if optimizer else ("model",):
        ours, theirs = (open_checkpoint(folder, part) for folder in (a, b))
        for one, other, found in ((ours, theirs, only[0]), (theirs, ours, only[1])):
            found += [f"{part} {name}" for name in one if name not in other]
        for name in (name for name in ours if name in theirs):
            info, shape = ours.infos[name], theirs.infos[name].shape
            if info.shape != shape:
                unlike.append(f"{part} {name}: shape {list(info.shape)} in a, {list(shape)} in b")
            else:
                changes.append(_compare(part, name, ours, theirs))
            if progress is not None:
                progress(info.num_bytes)
    changes.sort(key=lambda change: -_rank(change.products))
    return Difference(changes, unlike, *only)


def _compare(part: str, name: str, ours: TensorFiles, theirs: TensorFiles) -> Change:
    a, b = ours.read(name), theirs.read(name)
    equal = a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))
    return Change(part, name, Products.of(a, b), equal)


def _rank(products: Products) -> float:
    """Where in the list of changes; what is not a number comes first."""
    return math.inf if math.isnan(products.relative) else products.relative

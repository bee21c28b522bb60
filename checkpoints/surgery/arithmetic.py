"""Tensors of the same shape made into one: averages, interpolation, and differences from a common base.

Each model's tensor is read when it is needed, so that few are in memory at a time: `reads` has a function for each
model that gives its tensor, in fp32 or fp64 and in memory of its own. tau: a model's difference from the base.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Read = Callable[[], Tensor]
ELEMENTS = 1 << 18  # of a tensor, worked on at once


@dataclass(frozen=True)
class Products:
    """Of two tensors a and b of the same shape, in fp64: sums over their elements, and the largest |b - a|."""

    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0
    difference: float = 0.0  # sum of (b - a)^2
    largest: float = 0.0

    def __add__(self, other: "Products") -> "Products":
        return Products(
            self.aa + other.aa,
            self.ab + other.ab,
            self.bb + other.bb,
            self.difference + other.difference,
            other.largest if math.isnan(other.largest) else max(self.largest, other.largest),  # NaN stays
        )

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> "Products":
        found = cls()
        for x, y in zip(_views(a), _views(b), strict=True):
            x, y = x.double(), y.double()
            off = y - x
            sums = (float(x @ x), float(x @ y), float(y @ y), float(off @ off), float(off.abs().max()))
            found = found + cls(*sums)
        return found

    @property
    def cosine(self) -> float:
        """1 for two tensors of zeros, 0 where one of them is."""
        if not self.aa or not self.bb:
            return float(self.aa == self.bb)
        return self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)

    @property
    def relative(self) -> float:
        """2-norm of b - a over that of a."""
        if not self.aa:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.aa)


def running_mean(reads: Sequence[Read], shares: Sequence[float]) -> Tensor:
    """The first model's tensor, moved towards each next one by its share of the way; equal ones stay what they are."""
    result = reads[0]()
    for read, share in zip(reads[1:], shares[1:], strict=True):
        result.lerp_(read(), share)
    return result


def mean_shares(weights: Sequence[float]) -> list[float]:
    """Of `running_mean`, for the mean by `weights`."""
    total, shares = 0.0, []
    for weight in weights:
        total += weight
        shares.append(weight / total if total else 0.0)
    return shares


def slerp(reads: Sequence[Read], t: float) -> Tensor:
    """The point `t` of the way along the arc from the first to the second tensor (Shoemake 1985), each seen as one
    vector; along the line where they are almost parallel, opposite, or zero.
    """
    a, b = (read() for read in reads)
    products = Products.of(a, b)
    angle = math.acos(max(-1.0, min(1.0, products.cosine)))
    if not products.aa or not products.bb or math.sin(angle) < 1e-6:
        return a.lerp_(b, t)
    return a.mul_(math.sin((1 - t) * angle) / math.sin(angle)).add_(b, alpha=math.sin(t * angle) / math.sin(angle))


def task_arithmetic(base: Tensor, reads: Sequence[Read], weights: Sequence[float], scale: float) -> Tensor:
    """base + scale * sum of weight * tau (Ilharco et al. 2022, arXiv:2212.04089)."""
    result = base.clone()
    for read, weight in zip(reads, weights, strict=True):
        result.add_(read().sub_(base), alpha=scale * weight)
    return result


def ties(base: Tensor, reads: Sequence[Read], weights: Sequence[float], scale: float, keep: float) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim each tau to its largest elements, elect a sign for each place,
    and average those of that sign.

    keep: share of elements of each tau that stay, here of each tensor (the paper: of the whole model).
    """
    elected = torch.zeros_like(base)
    for read, weight in zip(reads, weights, strict=True):
        elected.add_(trim(read().sub_(base), keep), alpha=weight)
    signs = elected.sign().to(torch.int8)
    del elected
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for read, weight in zip(reads, weights, strict=True):
        _vote(trim(read().sub_(base), keep), signs, weight, total, count)
    for sums, votes in zip(_views(total), _views(count), strict=True):
        sums.div_(votes.where(votes > 0, 1.0))
    return total.mul_(scale).add_(base)


def trim(tau: Tensor, keep: float) -> Tensor:
    """Zero all but the `keep` share of largest elements (at least one; equal ones at the edge all stay); in place."""
    sizes = tau.abs().flatten()
    place = len(sizes) - max(1, round(keep * len(sizes)))
    array = sizes.numpy()
    array.partition(place)  # in place: torch's kthvalue would hold an index of 8 bytes for each element
    edge = float(array[place])
    del sizes, array
    for part in _views(tau):
        part.mul_(part.abs() >= edge)
    return tau


def dare(
    base: Tensor,
    reads: Sequence[Read],
    weights: Sequence[float],
    scale: float,
    drop: float,
    generators: Sequence[Generator],
) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099) with task arithmetic: each element of tau is dropped with probability
    `drop`, and those that are left are divided by 1 - drop.
    """
    result = base.clone()
    for read, weight, generator in zip(reads, weights, generators, strict=True):
        result.add_(_drop(read().sub_(base), drop, generator), alpha=scale * weight / (1 - drop))
    return result


# Functions of their own, so that views of one model's tau are gone before the next one's comes.
def _vote(tau: Tensor, signs: Tensor, weight: float, total: Tensor, count: Tensor) -> None:
    """Add the elements of tau that have the elected sign to `total`, and to `count` that there is one."""
    for part, sign, sums, votes in zip(*map(_views, (tau, signs, total, count)), strict=True):
        agrees = part * sign > 0
        sums.add_(part * agrees, alpha=weight)
        votes.add_(agrees, alpha=weight)


def _drop(tau: Tensor, drop: float, generator: Generator) -> Tensor:
    for part in _views(tau):
        part.mul_(torch.rand(part.shape, generator=generator) >= drop)
    return tau


def _views(tensor: Tensor) -> Sequence[Tensor]:
    """A contiguous tensor as vectors that fit into the cache, so that what is made of them is small."""
    return tensor.view(-1).split(ELEMENTS) if tensor.numel() else ()

"""Experts out of a dense gated feed-forward layer, and what is left of its output.

Shape letters: H hidden, F width of the layer, E experts, f = F / E width of a part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

ROUNDS = 20  # of k-means at most; it has mostly settled by then


def contiguous(gate: Tensor, up: Tensor, experts: int, generator: Generator) -> Tensor:
    """Neighbours stay together."""
    return torch.arange(len(gate))


def random(gate: Tensor, up: Tensor, experts: int, generator: Generator) -> Tensor:
    """Every unit is equally likely in every expert."""
    return torch.randperm(len(gate), generator=generator)


def clustering(gate: Tensor, up: Tensor, experts: int, generator: Generator) -> Tensor:
    """Units that read alike stay together: balanced k-means on the directions of their rows in gate and up, after
    MoEfication (Zhang et al. 2022, arXiv:2110.01786).
    """
    points = F.normalize(torch.cat([gate, up], dim=1).float(), dim=1)
    best, least = torch.arange(len(points)), float("inf")
    centres = points[_spread(points, experts, generator)]
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres)
        cluster = balanced(distance)
        total = float(distance.gather(1, cluster[:, None]).square().sum())
        if total >= least:
            break
        best, least = cluster.argsort(stable=True), total
        centres = torch.zeros_like(centres).index_add(0, cluster, points) / (len(points) // experts)
    return best


# Method -> the order of the units [F] in which expert e has the e-th f of them. gate, up: [F, H].
PARTITIONS: dict[str, Callable[[Tensor, Tensor, int, Generator], Tensor]] = {
    "contiguous": contiguous,
    "random": random,
    "clustering": clustering,
}
METHODS = ("copy", *PARTITIONS)


def balanced(distance: Tensor) -> Tensor:
    """Cluster [N] of each point, all equally full; distance: [N, E]. Those nearest to a cluster get in first."""
    distance = distance.clone()
    room = [len(distance) // distance.shape[1]] * distance.shape[1]
    cluster = torch.full((len(distance),), -1)
    while len(free := (cluster < 0).nonzero()[:, 0]):  # each round takes in all, or fills a cluster
        nearest = distance[free].min(dim=1)
        for index in nearest.indices.unique().tolist():
            asking = (nearest.indices == index).nonzero()[:, 0]
            taken = asking[nearest.values[asking].argsort(stable=True)[: room[index]]]
            cluster[free[taken]] = index
            room[index] -= len(taken)
            if not room[index]:
                distance[:, index] = torch.inf
    return cluster


def _spread(points: Tensor, count: int, generator: Generator) -> list[int]:
    """Points that are far from each other (k-means++, Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full((len(points),), torch.inf)
    while len(chosen) < count:
        nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(1))
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(odds.multinomial(1, generator=generator)))
    return chosen


def copies(dense: Tensor, experts: int) -> Tensor:
    """[...] -> [E, ...], all equal, without memory of their own."""
    return dense.expand(experts, *dense.shape)


def noisy_copies(dense: Tensor, experts: int, std: float, share: float, generator: Generator) -> Tensor:
    """[...] -> [E, ...]: a `share` of the entries of each gets normal noise of `std` times the tensor's own."""
    scale = std * float(dense.float().std())
    out = torch.empty(experts, *dense.shape, dtype=dense.dtype)
    for expert in out:
        noise = torch.empty(dense.shape).normal_(0.0, scale, generator=generator)
        if share < 1:
            noise *= torch.empty(dense.shape).uniform_(generator=generator) < share
        expert.copy_(dense.float() + noise)
    return out


def parts(dense: Tensor, order: Tensor, experts: int, dim: int) -> Tensor:
    """Units, in dim `dim` of gate, up [F, H] (0) or down [H, F] (1) -> [E, f, H] or [E, H, f]."""
    return dense.index_select(dim, order).unflatten(dim, (experts, -1)).movedim(dim, 0)


@dataclass(frozen=True)
class Mixing:
    """How the experts' outputs are weighted.

    softmax: scores are a softmax over experts, else a sigmoid each. normalized: weights of a token's experts sum to
    `scale`, else they are scores times `scale`. whole: every token gets exactly its top_k experts.
    zero_router: all its logits are 0.
    """

    experts: int
    top_k: int
    softmax: bool
    normalized: bool
    whole: bool
    zero_router: bool

    @property
    def even_weight(self) -> float:
        """A chosen expert's weight at scale 1 where all logits are equal."""
        return 1 / self.top_k if self.normalized else 1 / self.experts if self.softmax else 0.5

    def scale(self, method: str) -> float:
        """The scale at which, all logits being equal, chosen copies average and chosen parts add up."""
        return 1 / self.even_weight / (self.top_k if method == "copy" else 1)

    def loss_of(self, method: str, noise: bool, scale: float) -> str:
        """Why the output is not exactly the dense layer's; empty where it is, up to rounding."""
        if noise:
            return "noise was added to the copies"
        if method != "copy" and self.top_k < self.experts:
            return f"a token gets {self.top_k} of the {self.experts} parts of the dense layer"
        if abs(scale / self.scale(method) - 1) > 1e-6:
            return f"model.moe.scale = {scale:.6g}, not {self.scale(method):.6g}"
        if not self.whole:
            return "tokens do not all get top_k experts where there is a capacity or experts choose"
        sum_to_scale = self.normalized or (self.softmax and self.top_k == self.experts)
        if self.zero_router or (method == "copy" and sum_to_scale):
            return ""
        cure = "set model.moe.normalize = true" if method == "copy" else "take --router zero"
        return f"weights depend on the router: {cure}"

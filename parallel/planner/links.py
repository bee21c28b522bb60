"""Collectives of a step: how many bytes, over which link, how long.

Ring algorithms: a gather or reduce-scatter of b bytes over n processes moves b (n - 1) / n through each; an all-reduce
is both (Thakur et al. 2005, doi:10.1177/1094342005051521). Between machines, a group uses the network cards of all its
members in a machine at once.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.planner.gpus import Gpu, Kernels
from parallel.planner.layout import Layout

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclass(frozen=True)
class Group:
    """A mesh axis: size processes, `stride` apart, of which `near` are in one NVLink domain."""

    axis: str
    size: int
    near: int

    @property
    def link(self) -> str:
        return "NVLink" if self.near >= self.size else "network"


@dataclass(frozen=True)
class Traffic:
    """A collective, `count` times a step. bytes: sent by one process, each time. seconds: of one, alone on its link."""

    axis: str
    kind: Kind
    what: str
    count: float
    bytes: float
    link: str
    seconds: float


def groups(layout: Layout, gpu: Gpu) -> dict[str, Group]:
    """Ranks are laid out with tp innermost, pp outermost."""
    found, stride = {}, 1
    for axis, size in (
        ("tp", layout.tp),
        ("cp", layout.cp),
        ("dp_shard", layout.dp_shard),
        ("dp_replicate", layout.dp_replicate),
        ("pp", layout.pp),
    ):
        found[axis] = Group(axis, size, min(size, max(1, gpu.domain // stride)))
        stride *= size
    found["shards"] = Group("dp_shard x cp", layout.shards, min(layout.shards, max(1, gpu.domain // layout.tp)))
    # Experts take processes of cp and dp_shard.
    found["ep"] = Group("ep", layout.ep, min(layout.ep, max(1, gpu.domain // layout.tp)))
    rest = max(1, layout.shards // layout.ep)
    found["expert shards"] = Group("dp_shard / ep", rest, min(rest, max(1, gpu.domain // (layout.tp * layout.ep))))
    return found


def collective(
    group: Group, kind: Kind, what: str, size: float, gpu: Gpu, kernels: Kernels, count: float = 1
) -> Traffic:
    """size: bytes of the whole tensor (gathered, or to be reduced); for all-to-all and send of one process's part."""
    n = group.size
    if n == 1:
        return Traffic(group.axis, kind, what, 0, 0.0, "NVLink", 0.0)
    nodes = -(-n // group.near)
    if kind == "send":
        near = group.near > 1 and group.near >= n
        seconds = size / (gpu.nvlink * kernels.nvlink if near else gpu.network * kernels.network)
        return Traffic(group.axis, kind, what, count, size, group.link, seconds + kernels.latency)
    sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    fast = gpu.nvlink * kernels.nvlink
    if kind == "all-to-all":
        seconds = size * (group.near - 1) / n / fast
        seconds = max(seconds, size * (n - group.near) / n / (gpu.network * kernels.network))
    else:
        seconds = sent / (fast if nodes == 1 else min(fast, group.near * gpu.network * kernels.network))
    hops = (n - nodes) * kernels.latency_near if nodes == 1 else nodes * kernels.latency
    seconds += min(hops, 40 * kernels.latency) + kernels.latency_near * 3
    return Traffic(group.axis, kind, what, count, sent, group.link, seconds)

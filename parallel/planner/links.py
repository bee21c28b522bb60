"""Collectives of a step: how many bytes, over which link, how long.

Ring algorithms: a gather or reduce-scatter of b bytes over n processes moves b (n - 1) / n through each; an all-reduce
is both (Thakur et al. 2005, doi:10.1177/1094342005051521). Between machines, a group uses the network cards of all its
members in a machine at once.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from parallel.planner.layout import Setting

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclass(frozen=True)
class Group:
    """A mesh axis: size processes, of which `near` are in one NVLink domain."""

    axis: str
    size: int
    near: int

    @property
    def link(self) -> str:
        return "NVLink" if self.near >= self.size else "network"


@dataclass(frozen=True)
class Traffic:
    """A collective, `count` times a step. size: bytes of the larger of what one process gives and gets; sent: of what
    it puts on the link. seconds: of one, alone on its link."""

    axis: str
    kind: Kind
    what: str
    count: float
    size: float
    sent: float
    link: str
    seconds: float

    def times(self, factor: float) -> "Traffic":
        return replace(self, count=self.count * factor)


@lru_cache(maxsize=1 << 12)
def groups(pp: int, dp_replicate: int, dp_shard: int, cp: int, tp: int, ep: int, domain: int) -> dict[str, Group]:
    """Ranks are laid out with tp innermost, pp outermost; ep takes processes of cp and dp_shard. "shards" are those
    that share parameters, "expert shards" those that share the parameters of the same experts."""

    def group(axis: str, size: int, stride: int) -> Group:
        return Group(axis, size, min(size, max(1, domain // stride)))

    shards = cp * dp_shard
    return {
        "tp": group("tp", tp, 1),
        "cp": group("cp", cp, tp),
        "dp_replicate": group("dp_replicate", dp_replicate, tp * shards),
        "pp": group("pp", pp, tp * shards * dp_replicate),
        "shards": group("dp_shard x cp", shards, tp),
        "ep": group("ep", ep, tp),
        "expert shards": group("dp_shard / ep", max(1, shards // ep), tp * ep),
    }


def axis_of(setting: Setting, axis: str) -> Group:
    """One of `groups`."""
    degrees = setting.layout
    return groups(
        degrees.pp,
        degrees.dp_replicate,
        degrees.dp_shard,
        degrees.cp,
        degrees.tp,
        degrees.ep,
        setting.gpu.domain,
    )[axis]


def collective(setting: Setting, axis: str, kind: Kind, what: str, size: float, count: float = 1) -> Traffic:
    """size: bytes of the whole tensor (gathered, or to be reduced); for all-to-all and send of one process's part."""
    group, kernels = axis_of(setting, axis), setting.kernels
    n, near = group.size, group.near
    if n == 1:
        return Traffic(group.axis, kind, what, 0, size, 0.0, "NVLink", 0.0)
    fast, slow = setting.gpu.nvlink * kernels.nvlink, setting.gpu.network * kernels.network
    if kind == "send":
        seconds = size / (fast if near >= n else slow) + kernels.latency
        return Traffic(group.axis, kind, what, count, size, size, group.link, seconds)
    nodes = -(-n // near)
    sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    if kind == "all-to-all":
        seconds = max(size * (near - 1) / n / fast, size * (n - near) / n / slow)
    else:
        seconds = sent / (fast if nodes == 1 else min(fast, near * slow))
    hops = (n - 1) * kernels.latency_near if nodes == 1 else nodes * kernels.latency
    seconds += min(hops, 40 * kernels.latency) + kernels.latency_near * 3
    return Traffic(group.axis, kind, what, count, size, sent, group.link, seconds)

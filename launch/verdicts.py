"""What the findings of a health check say against which node."""

from collections.abc import Sequence
from statistics import median, median_high
from typing import Any, NamedTuple

SLOW = 1.5  # times the median time of a matrix product
SKEW = 0.5  # seconds
WEAK_LINK = 0.25  # of the median bandwidth
LITTLE_MEMORY = 0.5  # of the median free memory
LINKS = {"link": "links", "device_link": "links of devices"}  # by the readings that they are judged by

Finding = dict[str, Any]
Facts = dict[str, Any]


def judge(ranks: Sequence[Facts]) -> list[Finding]:
    """What is wrong with whom, by what `launch.health.examine` found. "sick": its node should be left out."""
    found: list[Finding] = []
    if not ranks:
        return found
    usual = median([facts["matmul_s"] for facts in ranks])
    memory = median([facts["memory_gb"] for facts in ranks])
    first = ranks[0]
    for facts in ranks:
        who, host = f"rank {facts['rank']} on {facts['host']}", facts["host"]
        if facts["matmul_s"] > SLOW * usual:
            how = f"{facts['matmul_s'] * 1e3:.3g} ms for a matrix product, the median is {usual * 1e3:.3g} ms"
            found.append(finding("slow", host, f"{who} is slow: {how}", sick=True))
        if facts["memory_gb"] < LITTLE_MEMORY * memory:
            how = f"{facts['memory_gb']:.1f} GB free, the median is {memory:.1f} GB"
            found.append(finding("memory", host, f"{who} has little memory: {how}", sick=True))
        if abs(facts["clock_s"]) > SKEW:
            found.append(finding("clock", host, f"{who}: its clock is {facts['clock_s']:+.1f} s from rank 0's"))
        if not facts["sees_folder"]:
            found.append(finding("folder", host, f"{who} does not see the run's folder of rank 0", sick=True))
        else:
            for source, size in facts["shards"].items():
                if size != first["shards"].get(source) or size < 0:
                    text = f"{who} does not see the shards {source} as rank 0 does"
                    found.append(finding("shards", host, text, sick=size != first["shards"].get(source)))
        if (facts["device"], facts["driver"]) != (first["device"], first["driver"]):
            text = f"{who} has {facts['device']} ({facts['driver']}), rank 0 {first['device']} ({first['driver']})"
            found.append(finding("device", host, text))
    return found + _twice(ranks) + _weak_links(ranks)


def _twice(ranks: Sequence[Facts]) -> list[Finding]:
    """Nodes that are one machine, and ranks that have one GPU."""
    found = []
    names: dict[str, str] = {}
    owners: dict[tuple[str, int], int] = {}
    for facts in ranks:
        known = names.setdefault(facts["machine"], facts["host"])
        if known != facts["host"]:
            names[facts["machine"]] = facts["host"]
            found.append(finding("twice", facts["host"], f"{facts['host']} and {known} are one machine"))
        if facts["device_index"] is not None:
            owner = owners.setdefault((facts["machine"], facts["device_index"]), facts["rank"])
            if owner != facts["rank"]:
                text = f"ranks {owner} and {facts['rank']} on {facts['host']} share GPU {facts['device_index']}"
                found.append(finding("twice", facts["host"], text))
    return found


class Link(NamedTuple):
    a: Facts
    b: Facts
    speed: float  # bytes a second

    @property
    def hosts(self) -> set[str]:
        return {self.a["host"], self.b["host"]}


def _weak_links(ranks: Sequence[Facts]) -> list[Finding]:
    """Those between nodes are judged by each other, those within nodes likewise; in host memory, and of devices."""
    found = []
    for key, what in LINKS.items():
        links = [Link(facts, ranks[facts[key]["to"]], facts[key]["bytes_per_s"]) for facts in ranks if facts.get(key)]
        found += _between([link for link in links if len(link.hosts) == 2], what)
        found += _within([link for link in links if len(link.hosts) == 1], what)
    return found


def _between(links: Sequence[Link], what: str) -> list[Finding]:
    """A node all of whose links are weak, by the median of the others, is sick; not so if each of them leads to another
    such node, which may be the cause. Of other weak links, as of one between the only two nodes, nobody knows whose
    fault it is.
    """
    poor: dict[str, float] = {}
    for host in sorted({host for link in links for host in link.hosts}):
        others = [link.speed for link in links if host not in link.hosts]
        usual = median_high(others) if others else 0.0
        if all(link.speed < WEAK_LINK * usual for link in links if host in link.hosts):
            poor[host] = usual
    found, sick = [], set()
    for host, usual in poor.items():
        own = [link for link in links if host in link.hosts]
        if not all(link.hosts <= poor.keys() for link in own):
            sick.add(host)
            speeds = ", ".join(f"{link.speed / 1e9:.3g}" for link in own)
            how = f"{speeds} GB/s, the median of the others is {usual / 1e9:.3g} GB/s"
            found.append(finding("link", host, f"{host}: all its {what} to other nodes are weak: {how}", sick=True))
    return found + [finding("link", None, text) for link, text in _weak(links, what) if not link.hosts & sick]


def _within(links: Sequence[Link], what: str) -> list[Finding]:
    """A weak link within a node is its own fault; a node that has no other is sick."""
    weak = _weak(links, what)
    slow = [link for link, _ in weak]
    good = {link.a["host"] for link in links if link not in slow}
    return [finding("link", link.a["host"], text, sick=link.a["host"] not in good) for link, text in weak]


def _weak(links: Sequence[Link], what: str) -> list[tuple[Link, str]]:
    """The links that are far below the median, and how far."""
    usual = median_high([link.speed for link in links] or [0.0])
    return [
        (
            link,
            f"rank {link.a['rank']} on {link.a['host']} to rank {link.b['rank']} on {link.b['host']}: "
            f"{link.speed / 1e9:.3g} GB/s, the median of {what} is {usual / 1e9:.3g} GB/s",
        )
        for link in links
        if link.speed < WEAK_LINK * usual
    ]


def finding(kind: str, host: str | None, text: str, sick: bool = False) -> Finding:
    return {"kind": kind, "host": host, "text": text, "sick": sick}

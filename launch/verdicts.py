"""What the findings of a health check say against which node."""

from collections.abc import Sequence
from statistics import median
from typing import Any

SLOW = 1.5  # times the median time of a matrix product
SKEW = 0.5  # seconds
WEAK_LINK = 0.25  # of the median bandwidth
LITTLE_MEMORY = 0.5  # of the median free memory

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


def _weak_links(ranks: Sequence[Facts]) -> list[Finding]:
    """A node both of whose links are weak is sick; of one weak link nobody knows whose fault it is."""
    links = [(facts, ranks[facts["link"]["to"]], facts["link"]["bytes_per_s"]) for facts in ranks if facts.get("link")]
    usual = median([speed for _, _, speed in links] or [0.0])
    weak = [(a, b, speed) for a, b, speed in links if speed < WEAK_LINK * usual]
    ends = [facts["rank"] for a, b, _ in weak for facts in (a, b)]
    found = []
    for a, b, speed in weak:
        text = (
            f"rank {a['rank']} on {a['host']} to rank {b['rank']} on {b['host']}: {speed / 1e9:.3g} GB/s, the median "
        )
        found.append(finding("link", None, f"{text}is {usual / 1e9:.3g} GB/s"))
    for facts in ranks:
        if ends.count(facts["rank"]) > 1:
            text = f"rank {facts['rank']} on {facts['host']}: both its links are weak"
            found.append(finding("link", facts["host"], text, sick=True))
    return found


def finding(kind: str, host: str | None, text: str, sick: bool = False) -> Finding:
    return {"kind": kind, "host": host, "text": text, "sick": sick}

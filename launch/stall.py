"""Why a run stands still, in one paragraph, from what its ranks say of themselves."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

Report = Mapping[str, Any]
Key = tuple[str, str]  # backend and group: each counts its collectives by itself
# How far a rank is in a collective. CALLED and BEGUN are told apart where torch records when a device begins one.
ABSENT, CALLED, BEGUN, ENDED = range(4)


class Knot(NamedTuple):
    """A collective that is called and does not end. stages: how far each rank of its group is in it. late: the ranks
    that hold the others up, none where all are equally far.
    """

    each: Report
    stages: Mapping[int, int]
    late: list[int]


def explain_stall(reports: Mapping[int, Report], beats: Mapping[int, Report | None], seconds: float) -> str:
    """Which rank is missing from which collective, or stuck in which reading or saving.

    reports: of each rank that could tell, what `Watchdog` writes. beats: the heartbeat of each rank, None where there
    is none to be read. seconds: how long nobody moved.

    A rank with an open collective waits in it, wherever its host stands: those of NCCL wait for their device, far
    behind the calls.
    """
    silent = [rank for rank in beats if rank not in reports]
    idle = [rank for rank, report in reports.items() if not _waits(report)]
    knot = _find_knot(reports, beats)
    late = knot.late if knot is not None else []
    # Who does not come because it waits elsewhere is no cause as long as another one hangs.
    culprits = [rank for rank in late if rank in silent or rank in idle] or silent or idle or late
    parts = [f"no progress for {seconds:.0f} s"]
    if knot is not None and late:
        parts.append(_late(knot, [rank for rank in late if rank in culprits] or late))
    elif knot is not None and not culprits:
        parts.append(_all_in(knot))
    parts += [_state(rank, reports.get(rank), beats.get(rank)) for rank in culprits[:4]]
    if len(culprits) > 4:
        parts.append(f"and so with {_ranks(culprits[4:])}")
    waiting = [rank for rank in reports if rank not in culprits]
    if waiting and knot is None:
        parts += _elsewhere(reports, waiting)
    return "; ".join(parts)


def _find_knot(reports: Mapping[int, Report], beats: Mapping[int, Report | None]) -> Knot | None:
    """Of several the first one that waits for a rank which itself waits for nothing else; or else the first one."""
    last: dict[tuple[int, Key], int] = {}
    stages: dict[tuple[Key, int], dict[int, int]] = {}
    begun: dict[tuple[Key, int], tuple[int, Report]] = {}  # how many a rank has open before it at most, what it is
    first: dict[int, tuple[Key, int]] = {}
    for rank, report in reports.items():
        before = 0
        for each in report["collectives"]:
            key = (each["backend"], each["group"])
            if not each["p2p"]:
                last[rank, key] = max(last.get((rank, key), 0), each["number"])
            if each["open"] and not each["p2p"]:
                place = (key, each["number"])
                stages.setdefault(place, {})[rank] = BEGUN if each["started"] else CALLED
                begun[place] = (max(before, begun[place][0] if place in begun else 0), each)
                if not before:
                    first[rank] = place
            before += each["open"]
    found = []
    for place, (before, each) in begun.items():
        key, number = place
        members = [rank for rank in each["ranks"] or beats if rank in beats]
        far = {
            rank: ABSENT if last.get((rank, key), 0) < number else stages[place].get(rank, ENDED) for rank in members
        }
        late = _hindmost(far, on_device=each["backend"] == "nccl")
        roots = [
            rank
            for rank in late
            if rank not in reports or (first.get(rank) == place if far[rank] else not _waits(reports[rank]))
        ]
        found.append((not roots, before, not late, number, Knot(each, far, late)))
    return min(found, key=lambda row: row[:4])[4] if found else None


def _hindmost(stages: Mapping[int, int], on_device: bool) -> list[int]:
    """The ranks that are behind others. On the host all that have come are equally far: their ends differ by little."""
    least = min(stages.values())
    if least == max(stages.values()) or (least != ABSENT and not on_device):
        return []
    return [rank for rank, stage in stages.items() if stage == least]


def _waits(report: Report) -> bool:
    """Whether a rank waits for others: its host stands in a collective, or its device has not ended one."""
    return report["waits"] or any(each["open"] for each in report["collectives"])


def _late(knot: Knot, late: list[int]) -> str:
    what, stages, one = _collective(knot.each), knot.stages, len(late) == 1
    ahead = [rank for rank in stages if rank not in knot.late]
    if stages[late[0]] == ABSENT:
        return f"{_ranks(late)} {'has' if one else 'have'} not come to {what}, in which {_wait(ahead)}"
    if BEGUN in [stages[rank] for rank in ahead]:
        device = "the device of " if one else "the devices of "
        inside = [rank for rank in ahead if stages[rank] == BEGUN]
        return (
            f"{device}{_ranks(late)} {'has' if one else 'have'} not begun {what}, in which {_wait(inside)}: "
            "what was queued before it hangs there"
        )
    return f"{what} does not end on {_ranks(late)}, while it has ended on {_ranks(ahead)}"


def _all_in(knot: Knot) -> str:
    what = _collective(knot.each)
    if knot.each["backend"] != "nccl":
        return f"all its ranks are in {what}, which does not end: look at the network between them"
    if BEGUN in knot.stages.values():
        return f"all its ranks have begun {what}, which does not end: look at the network between them"
    return (
        f"all its ranks have called {what}, which does not end: look at the network between them, and at what their "
        "devices run before it (TORCH_NCCL_ENABLE_TIMING=1 tells whose has not begun it)"
    )


def _elsewhere(reports: Mapping[int, Report], waiting: list[int]) -> list[str]:
    """What ranks wait in where it is no collective: a send or receive of their devices, or a call of their hosts."""
    parts: list[str] = []
    hosts = []
    for rank in waiting:
        opened = next((each for each in reports[rank]["collectives"] if each["open"]), None)
        if opened is None:
            hosts.append(rank)
        elif len(parts) < 4:
            parts.append(f"{_wait([rank])} in {_collective(opened)}")
    return [*parts, *([f"{_wait(hosts)} at {reports[hosts[0]]['where']}"] if hosts else [])]


def _state(rank: int, report: Report | None, beat: Report | None) -> str:
    """What is known of a rank that holds the others up."""
    if report is None:
        if beat is None:
            return f"rank {rank} has left no heartbeat"
        return (
            f"rank {rank} ({beat['host']}, process {beat['pid']}) does not respond: it is stopped, or hangs in a "
            f"system call, or its host is gone; its last sign came {_age(beat)} ago, at step {beat['step']}, in phase "
            f'"{beat["phase"]}"'
        )
    at = f", at {report['reading']}" if report["reading"] else ""
    return (
        f"rank {rank} ({report['host']}, process {report['pid']}) stands since {report['silence']:.0f} s in phase "
        f'"{report["phase"]}" after step {report["step"]} at {report["where"]}{at}'
    )


def _age(beat: Report) -> str:
    try:
        return f"{(datetime.now(UTC) - datetime.fromisoformat(beat['alive'])).total_seconds():.0f} s"
    except (KeyError, TypeError, ValueError):
        return "some time"


def _collective(each: Report) -> str:
    shape = "x".join(map(str, each["shape"])) or "scalar"
    members = f" of {_ranks(each['ranks'])}" if each["ranks"] else ""
    return f"{each['op']} ({shape} {each['dtype']}, number {each['number']}{members}, {each['where']})"


def _wait(ranks: list[int]) -> str:
    return f"{_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''}"


def _ranks(ranks: list[int]) -> str:
    """rank 3, ranks 0-4, 7"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"

"""Why a run stands still, in one paragraph, from what its ranks say of themselves."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

Report = Mapping[str, Any]


def explain_stall(reports: Mapping[int, Report], beats: Mapping[int, Report | None], seconds: float) -> str:
    """Which rank is missing from which collective, or stuck in which reading or saving.

    reports: of each rank that could tell, what `Watchdog` writes. beats: the heartbeat of each rank, None where there
    is none to be read. seconds: how long nobody moved.
    """
    silent = [rank for rank in beats if rank not in reports]
    idle = [rank for rank, report in reports.items() if not report["waits"]]
    awaited, inside, missing = _awaited(reports, beats)
    # Who does not come because it waits elsewhere is no cause as long as another one hangs.
    culprits = [rank for rank in missing if rank in silent or rank in idle] or silent or idle or missing
    parts = [f"no progress for {seconds:.0f} s"]
    if awaited is not None and missing:
        late = [rank for rank in missing if rank in culprits] or missing
        verb = "has" if len(late) == 1 else "have"
        parts.append(f"{_ranks(late)} {verb} not come to {_collective(awaited)}, in which {_wait(inside)}")
    elif awaited is not None and not culprits:
        parts.append(
            f"all its ranks are in {_collective(awaited)}, which does not end: look at the network between them"
        )
    parts += [_state(rank, reports.get(rank), beats.get(rank)) for rank in culprits[:4]]
    if len(culprits) > 4:
        parts.append(f"and so with {_ranks(culprits[4:])}")
    waiting = [rank for rank in reports if rank not in culprits]
    if waiting and awaited is None:
        parts.append(f"{_wait(waiting)} at {reports[waiting[0]]['where']}")
    return "; ".join(parts)


def _awaited(
    reports: Mapping[int, Report], beats: Mapping[int, Report | None]
) -> tuple[Report | None, list[int], list[int]]:
    """A collective that is begun and not ended, the ranks in it, and those that have not come.

    Of several, one that waits for a rank which itself waits for nobody.
    """
    last: dict[tuple[int, str], int] = {}
    begun: dict[tuple[str, int], Report] = {}
    for rank, report in reports.items():
        for each in report["collectives"]:
            place = (rank, each["group"])
            last[place] = max(last.get(place, 0), each["number"])
            if each["open"]:
                begun.setdefault((each["group"], each["number"]), each)
    found = []
    for (group, number), each in begun.items():
        members = [rank for rank in each["ranks"] or beats if rank in beats]
        inside = [rank for rank in members if last.get((rank, group), 0) >= number]
        missing = [rank for rank in members if rank not in inside]
        roots = [rank for rank in missing if rank not in reports or not reports[rank]["waits"]]
        found.append((not roots, not missing, number, (each, inside, missing)))
    return min(found, key=lambda row: row[:3])[3] if found else (None, [], [])


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

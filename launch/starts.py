"""The starts of a run, each with how it ended."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.rundir import lost_contact, read_ends, read_starts

DONE = ("finished", "stop_at")
STOPPED = (*DONE, "signal", "time limit", "preempted or cancelled")  # as it was asked to; all else is a failure


@dataclass(frozen=True)
class Start:
    """One start of training. What is not known is None.

    time: seconds since 1970, of an end without a start when that was recorded. step: that it went on from. reason,
    detail, rank, end_step, ended: how, why, told by which rank, after which step and when it ended; reason None: no
    end is recorded (yet).
    """

    time: float | None
    job: str | None
    restart: int
    hosts: tuple[str, ...]
    world_size: int | None
    step: int | None
    reason: str | None = None
    detail: str | None = None
    rank: int | None = None
    end_step: int | None = None
    ended: float | None = None


def read_story(run_dir: Path) -> list[Start]:
    """The starts, oldest first, with their ends. One that did not come to record its start stands there by its end."""
    starts = [_start(record) for record in read_starts(run_dir)]
    told: dict[int, list[dict[str, Any]]] = {}
    for end in read_ends(run_dir):
        number = _belongs(end, starts)
        if number is None:
            starts.append(Start(seconds(end.get("time")), end.get("job"), _count(end), _hosts(end), None, None))
            number = len(starts) - 1
        told.setdefault(number, []).append(end)
    found = [_ended(start, told[number]) if number in told else start for number, start in enumerate(starts)]
    return sorted(found, key=lambda start: start.time or 0.0)


def seconds(text: Any) -> float | None:
    """Seconds since 1970 of a time that a record holds."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _start(record: dict[str, Any]) -> Start:
    hosts = _hosts(record)
    size, step = record.get("world_size"), record.get("step")
    return Start(seconds(record.get("time")), record.get("job"), _count(record), hosts, size, step)


def _belongs(end: dict[str, Any], starts: list[Start]) -> int | None:
    """The last start of the same job that was there before this end."""
    at, job = seconds(end.get("time")), end.get("job")
    found = None
    for number, start in enumerate(starts):
        before = start.time is not None and (at is None or start.time <= at)
        if before and (job is None or start.job is None or job == start.job):
            found = number
    if found is not None and job is not None and _count(end) > starts[found].restart:
        return None
    return found


def _ended(start: Start, ends: list[dict[str, Any]]) -> Start:
    """With the end that says most: that another one is gone says least, a bare signal little."""

    def weight(end: dict[str, Any]) -> int:
        reason = end.get("reason")
        if reason in DONE:
            return 0
        if reason == "error":
            return 4 if lost_contact(str(end.get("detail"))) else 1
        return 3 if reason == "signal" else 2

    best = min(ends, key=weight)
    steps = [end["step"] for end in ends if isinstance(end.get("step"), int)]
    return replace(
        start,
        reason=str(best.get("reason")),
        detail=best.get("detail"),
        rank=best.get("rank"),
        end_step=max(steps, default=None),
        ended=seconds(best.get("time")),
    )


def _hosts(record: dict[str, Any]) -> tuple[str, ...]:
    hosts = record.get("hosts") or [record.get("host")]
    return tuple(str(host) for host in hosts if host)


def _count(record: dict[str, Any]) -> int:
    restart = record.get("restart")
    return restart if isinstance(restart, int) else 0

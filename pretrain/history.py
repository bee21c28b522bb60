"""The starts and the ends of a run: one JSON line for each in its folder. Imports no torch."""

import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"
ENDS = "ends.jsonl"
# What ranks say that lost another one: gloo, NCCL, the store that processes meet at, and `parallel.world`.
CONSEQUENCE = re.compile(
    r"by peer|Broken pipe|Socket Timeout|another process is gone|Dist(?:Network|Store|Backend)Error|ConnectionError|"
    r"Connection (?:refused|reset|closed)|\bgloo\b|NCCL|TCPStore|store->get|recvValue",
    re.IGNORECASE,
)
# How a start of training may end. A start without an end was killed hard: readers call it "lost".
REASONS = (
    "finished",
    "stop_at",
    "time limit",
    "preempted or cancelled",
    "signal",
    "error",
    "stalled",
    "rank lost",
    "node lost",
    "unhealthy",
)


def this_start(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Which start of training this process belongs to: {"job": SLURM's job id or None, "restart": how many times
    SLURM requeued it plus how many times torch's elastic agent started its ranks anew, "host"}.
    """
    counts = (environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return {
        "job": environ.get("SLURM_JOB_ID") or None,
        "restart": sum(int(count) for count in counts if count.isdecimal()),
        "host": platform.node(),
    }


def append_start(run_dir: Path, **fields: Any) -> None:
    """Add a line for a start of training: "time" (UTC, ISO 8601), "job", "restart", "host" and `fields`."""
    append_line(run_dir / STARTS, {"time": now(), **this_start(), **fields})


def append_end(run_dir: Path, reason: str, **fields: Any) -> None:
    """Add a line for the end of a start: "time", "job", "restart", "host", "reason" (one of REASONS), "detail", "rank"
    and "step", the last three None unless `fields` say otherwise.
    """
    if reason not in REASONS:
        raise ValueError(f"reason = {reason!r} of an end; allowed: {', '.join(REASONS)}")
    unknown = {"step": None, "rank": None, "detail": None}
    append_line(run_dir / ENDS, {"time": now(), **this_start(), **unknown, "reason": reason, **fields})


@contextmanager
def recording_end(run_dir: Path, rank: int, step: Callable[[], int]) -> Iterator[list[str | None]]:
    """Record how what stands inside ends: as the (reason, detail) that it puts into the list, told by rank 0; an error
    by the rank that has it. What a process dies of at once, others must tell.
    """
    end: list[str | None] = []
    try:
        yield end
    except Exception as error:
        # One line for an error that all ranks have, or that only says that another one is gone.
        if rank == 0 or not (getattr(error, "on_all_ranks", False) or lost_contact(str(error))):
            text = " ".join(str(error).split())
            detail = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
            with suppress(OSError):  # the error itself is on its way to the user
                append_end(run_dir, "error", detail=detail, rank=rank, step=step())
        raise
    if rank == 0 and end:
        assert end[0] is not None
        append_end(run_dir, end[0], detail=end[1], rank=rank, step=step())


def lost_contact(text: str) -> bool:
    """Whether an error says only that another process is gone: what that one says is the reason."""
    return CONSEQUENCE.search(text) is not None


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts, oldest first; those of older versions have no "time", "job" and "restart"."""
    return read_lines(run_dir / STARTS)


def read_ends(run_dir: Path) -> list[dict[str, Any]]:
    """The ends, oldest first; several may tell of one start."""
    return read_lines(run_dir / ENDS)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, in one write, so that lines of several processes stay apart. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(value) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; torn lines are left out. [] without the file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [value for line in text.splitlines() if isinstance(value := _parsed(line), dict)]


def now() -> str:
    """The time in UTC, ISO 8601, to the microsecond: their order tells which end is of which start."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

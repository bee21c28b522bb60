"""The starts and the ends of a run: one JSON line for each in its folder. Imports no torch."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"
ENDS = "ends.jsonl"
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
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

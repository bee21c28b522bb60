"""What stands in a run's folder beside its checkpoints, for all that start, watch and show runs. Imports no torch.

job.json      what was submitted         starts.jsonl, ends.jsonl    one line a start, an end of training
health.json   the last health check      heartbeats/rank-00000.json  where each rank is
logs/<job>.<restart>/rank-00000.log      what each rank printed (agent-<host>.log, supervisor.log beside them)
"""

import json
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.history import (
    append_end,
    append_line,
    append_start,
    lost_contact,
    read_ends,
    read_lines,
    read_starts,
    this_start,
)

__all__ = [
    "append_end",
    "append_line",
    "append_start",
    "first_error",
    "heartbeat_file",
    "last_written",
    "log_folder",
    "log_folders",
    "lost_contact",
    "new_local_job",
    "rank_log",
    "read_ends",
    "read_json",
    "read_lines",
    "read_starts",
    "this_start",
    "write_json",
]

READ_BYTES = 1 << 20  # of the end of a log: what a rank died of stands there
PREFIX = re.compile(r"^\[(?:rank|default)?\d+\]:? ?")  # what torch puts before the lines of a rank
RAISED = re.compile(r"^[A-Za-z_][\w.]*(?::|$)")  # the first line after a traceback's frames
FATAL = re.compile(r"^(?:Fatal Python error: .*|terminate called .*|.*\b(?:Segmentation fault|Bus error)\b.*)$")


class FirstError(NamedTuple):
    """What the first rank that failed said."""

    rank: int
    line: str
    path: Path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the whole new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path, tries: int = 3) -> Any:
    """What a JSON file holds; None without the file, and when it is still torn after `tries` readings, 10 ms apart."""
    for attempt in range(tries):
        if attempt:
            time.sleep(0.01)
        try:
            return json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            continue
    return None


def new_local_job() -> str:
    """Stands for the job id of a start without SLURM: "local-" and the time in UTC."""
    return datetime.now(UTC).strftime("local-%Y%m%d-%H%M%S")


def log_folder(run_dir: Path, job: str | int | None, restart: int) -> Path:
    """Where the logs of one start of a job go; job None: a start without SLURM, now. Not made here."""
    return run_dir / "logs" / f"{new_local_job() if job is None else job}.{restart}"


def log_folders(run_dir: Path, job: str | None = None) -> list[Path]:
    """The folders of logs, of one job if given, the one written to last at the end."""
    found = [folder for folder in (run_dir / "logs").glob("*.*") if folder.is_dir()]
    if job is not None:
        found = [folder for folder in found if job in (folder.name, folder.name.rpartition(".")[0])]
    return sorted(found, key=lambda folder: (last_written(folder), folder.name))


def rank_log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.log"


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "heartbeats" / f"rank-{rank:05d}.json"


def first_error(folder: Path) -> FirstError | None:
    """The error of the rank that failed first, from the ends of the logs in a log folder; None: no rank tells of one.

    Ranks that only lost contact with another come after those that say something of their own; among equals the log
    that was written to last longest ago is first.
    """
    found: list[tuple[bool, float, FirstError]] = []
    for path in sorted(folder.glob("rank-*.log")):
        rank = path.stem.removeprefix("rank-")
        line = error_in(_end_of(path))
        if line is not None and rank.isdecimal():
            found.append((lost_contact(line), path.stat().st_mtime, FirstError(int(rank), line, path)))
    return min(found)[2] if found else None


def error_in(text: str) -> str | None:
    """The line that says what a process died of, from what it printed: "pretrain: error: ...", the exception of its
    last traceback, or a crash; None where there is nothing of the sort.
    """
    lines = [PREFIX.sub("", line.rstrip()) for line in text.splitlines()]
    said = [line.removeprefix("pretrain: error: ") for line in lines if line.startswith("pretrain: error: ")]
    if said:
        return said[-1]
    raised = list(_raised(lines))
    crashed = [line for line in lines if FATAL.match(line)]
    return raised[-1] if raised else crashed[0] if crashed else None


def _raised(lines: list[str]) -> Iterator[str]:
    """The exception of each traceback. Of one raised from another the last; of one raised while another was being
    handled (as when the closing of something fails too) the one before.
    """
    held: str | None = None
    inside = silent = during = False
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            inside = True
            silent = number > 0 and lines[number - 1].startswith("Exception ignored")
        elif inside and RAISED.match(line):
            inside = False
            if not silent and not (during and held is not None):
                held = line
            during = False
            linked = next((later for later in lines[number + 1 :] if later), "")
            if linked.startswith("During handling of the above"):
                during = True
            elif not linked.startswith("The above exception was") and held is not None:
                yield held
                held = None
    if held is not None:
        yield held


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - READ_BYTES))
        return file.read().decode(errors="replace")


def last_written(folder: Path) -> float:
    """When something in a folder was last written to, seconds since 1970."""
    return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])

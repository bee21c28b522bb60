"""What the files of a run's folder say of how far it is. Imports no torch."""

import json
import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launch.rundir import read_json, read_lines
from launch.starts import Start, seconds

READ_BYTES = 1 << 20  # of the end of metrics.jsonl
WINDOW = 20  # steps that the speed is the median of
UNKNOWN_AGE = 1e9


@dataclass(frozen=True)
class Pace:
    """A rank's time a step without its waiting for others, and the median of the others."""

    rank: int
    host: str
    seconds: float
    median: float


def last_metrics(path: Path) -> dict[str, Any]:
    """ "step" and the last of each number; "seconds" and "tokens_per_s" are medians of the last steps."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - READ_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return {}
    rows = []
    for line in text.splitlines()[-10 * WINDOW :]:
        try:
            row = json.loads(line)
        except ValueError:  # torn at either end
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    found: dict[str, Any] = {}
    for row in rows:
        found |= row
    for name in ("seconds", "tokens_per_s"):
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)][-WINDOW:]
        if values:
            found[name] = median(values)
    return found


def read_target(run_dir: Path) -> int | None:
    """The step that the newest config trains to."""
    for name in ("config.toml", "submitted.toml"):
        try:
            chosen = tomllib.loads((run_dir / name).read_text(encoding="utf-8")).get("train", {})
        except (OSError, ValueError):
            continue
        steps = chosen.get("stop_at") or chosen.get("steps")
        if isinstance(steps, int):
            return steps
    return None


def last_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """Step, and when it was saved. A checkpoint's folder has its name once it is whole."""
    found = [(int(path.parent.name[5:]), path) for path in folder.glob("step-*/manifest.json")]
    if not found:
        return None, None
    step, path = max(found)
    try:
        return step, path.stat().st_mtime
    except FileNotFoundError:  # pruned in between
        return step, None


def read_heartbeats(run_dir: Path, story: Sequence[Start]) -> dict[int, dict[str, Any]]:
    """Of the ranks of the last start."""
    last = story[-1] if story else None
    found = {}
    for path in sorted((run_dir / "heartbeats").glob("rank-*.json")):
        beat, rank = read_json(path), path.stem.removeprefix("rank-")
        if not isinstance(beat, dict) or not rank.isdecimal():
            continue
        same = last is None or (beat.get("job") == last.job and int(rank) < (last.world_size or 1 << 30))
        if same:
            found[int(rank)] = beat
    return found


def silence(beat: dict[str, Any]) -> float:
    moved = seconds(beat.get("time"))
    return max(0.0, time.time() - moved) if moved is not None else 0.0


def age(beat: dict[str, Any]) -> float:
    written = seconds(beat.get("alive") or beat.get("time"))
    return time.time() - written if written is not None else UNKNOWN_AGE


def find_slowest(beats: dict[int, dict[str, Any]]) -> Pace | None:
    """The rank that takes the longest for a step, its waiting for others left out. None where heartbeats do not tell
    that, as on GPUs.
    """
    paces = {rank: float(beat["own_s"]) for rank, beat in beats.items() if beat.get("own_s")}
    if len(paces) < 2:
        return None
    rank = max(paces, key=lambda rank: paces[rank])
    others = median(value for other, value in paces.items() if other != rank)
    return Pace(rank, str(beats[rank].get("host")), paces[rank], others)


def last_stragglers(run_dir: Path, step: int | None) -> tuple[Pace, ...]:
    rows = [row for row in read_lines(run_dir / "stragglers.jsonl") if isinstance(row.get("step"), int)]
    if not rows or step is None:
        return ()
    newest, windows = rows[-1]["step"], sorted({row["step"] for row in rows})
    width = windows[-1] - windows[-2] if len(windows) > 1 else 10
    if not 0 <= step - newest <= 10 * width:
        return ()
    return tuple(
        Pace(row["rank"], str(row["host"]), row["seconds"], row["median"]) for row in rows if row["step"] == newest
    )

"""Sweeps: one run for each combination of values."""

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

MOST = 10_000
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
OPEN, CLOSE = "[{", "]}"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    overrides: list[str]
    run_dir: Path


def points_of(axes: list[str], run_dir: Path) -> list[Point]:
    """Every combination of `key=value,value,...`, the last axis fastest, each with a folder of its own.

    `a..b` stands for the integers from a to b. `key,key=value:value,...` moves several keys together. Commas inside
    brackets and quotes belong to a value. Raises ValueError for what is no axis.
    """
    choices = [_axis(axis) for axis in axes]
    keys = [key for options in choices for key in options[0]]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise ValueError(f"--sweep: {twice} is given twice; write its values with commas")
    if "run.dir" in keys:
        raise ValueError("--sweep run.dir: each point has its own folder below run.dir; leave it out")
    combined = [{key: value for part in parts for key, value in part.items()} for parts in product(*choices)]
    if len(combined) > MOST:
        raise ValueError(f"--sweep: {len(combined)} runs; at most {MOST}")
    return [
        Point(index, [f"{key}={value}" for key, value in values.items()], run_dir / f"{index:03d}")
        for index, values in enumerate(combined)
    ]


def describe_sweep(points: list[Point]) -> dict[str, Any]:
    """What stands in sweep.json."""
    rows = [{"index": point.index, "overrides": point.overrides, "dir": point.run_dir.name} for point in points]
    return {"points": rows}


def _axis(text: str) -> list[dict[str, str]]:
    left, separator, right = text.partition("=")
    keys = [key.strip() for key in left.split(",")]
    if not separator or not right or not all(keys):
        raise ValueError(f"--sweep {text!r}: write it as key=value,value, such as optim.lr=1e-4,3e-4 or run.seed=1..5")
    options = []
    for value in _split(right, ","):
        found = RANGE.fullmatch(value)
        values = [value]
        if found and len(keys) == 1:
            first, last = int(found[1]), int(found[2])
            if not 0 <= last - first < MOST:
                raise ValueError(f"--sweep {text!r}: {value} has {last - first + 1} numbers; 1 to {MOST} are allowed")
            values = [str(number) for number in range(first, last + 1)]
        for one in values:
            together = _split(one, ":") if len(keys) > 1 else [one]
            if len(together) != len(keys) or not all(together):
                raise ValueError(f"--sweep {text!r}: {one!r} is not one value for each of {', '.join(keys)}")
            options.append(dict(zip(keys, together, strict=True)))
    return options


def _split(text: str, at: str) -> list[str]:
    """Parts between separators that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in OPEN + CLOSE:
            depth += 1 if letter in OPEN else -1
        if letter == at and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]

"""Which checkpoints stay, which are pinned, and going back to an older one."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from checkpoints.commit import find_steps, step_folder
from checkpoints.manifest import STATE, Manifest, fsync, write_durably

MARK = re.compile(r"step-(\d+)\.(pinned|unpinned)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Of the whole checkpoints stay: the newest `keep`; those whose step is a multiple of `keep_every`; the
    `keep_best` best by the number that `state["metrics"]` holds under `best`; and those that are pinned.
    """

    keep: int = 3
    keep_every: int | None = None
    best: str | None = None
    best_mode: Literal["min", "max"] = "min"
    keep_best: int = 1

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep = {self.keep}: at least 1 checkpoint must be kept")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"checkpoint.keep_every = {self.keep_every}: must be at least 1 step, or left out")
        if self.keep_best < 1:
            raise ValueError(f"checkpoint.keep_best = {self.keep_best}: at least 1, or leave checkpoint.best out")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f'checkpoint.best_mode = "{self.best_mode}": must be "min" or "max"')

    def kept(self, whole: Sequence[int], metrics: Callable[[int], dict[str, float]], pinned: set[int]) -> set[int]:
        """Of the steps of whole checkpoints, ascending, those that stay. metrics: the numbers of a step."""
        stay = set(whole[-self.keep :]) | pinned
        if self.keep_every:
            stay |= {step for step in whole if step % self.keep_every == 0}
        if self.best is not None:
            sign = 1 if self.best_mode == "min" else -1
            scores = {step: metrics(step).get(self.best) for step in whole}
            ranked = sorted((sign * score, -step) for step, score in scores.items() if score is not None)
            stay |= {-step for _, step in ranked[: self.keep_best]}
        return stay


def prune(folder: Path, retention: Retention, whole: Sequence[int], just_saved: int) -> None:
    """Broken checkpoints do not count as kept, and are left for a person to look at."""
    stay = retention.kept(whole, lambda step: read_metrics(step_folder(folder, step)), pinned_steps(folder))
    stay.add(just_saved)
    for step in [step for step in whole if step not in stay]:
        path = step_folder(folder, step)
        doomed = folder / f".tmp-pruned-{path.name}"
        try:
            path.rename(doomed)  # so that a kill in the middle leaves no half checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("could not prune %s: %s", path, error)


def read_metrics(path: Path) -> dict[str, float]:
    """The finite numbers that a checkpoint's state holds under "metrics"; none where it cannot be read."""
    try:
        return numbers_of((path / STATE).read_bytes())
    except OSError:
        return {}


def numbers_of(state: bytes) -> dict[str, float]:
    """The same of the content of a `state.json`."""
    try:
        metrics = json.loads(state).get("metrics", {})
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    except (ValueError, AttributeError):
        return {}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def pin(folder: Path, step: int) -> None:
    """The checkpoint is never pruned. Raises FileNotFoundError where there is none."""
    find_step(folder, step)
    mark_pinned(folder, step)
    forget_unpinned(folder, step)


def unpin(folder: Path, step: int) -> None:
    """It may be pruned again, at the next save."""
    find_step(folder, step)
    if is_pinned(folder, step):  # the name stays, so that a copy elsewhere hears of it
        pin_file(folder, step).rename(_unpinned(folder, step))


def mark_pinned(folder: Path, step: int) -> None:
    """As `pin`, also of a checkpoint that is yet to come."""
    write_durably(pin_file(folder, step), b"")
    fsync(folder)


def is_pinned(folder: Path, step: int) -> bool:
    return pin_file(folder, step).exists()


def pinned_steps(folder: Path) -> set[int]:
    return {step for step in find_steps(folder) if is_pinned(folder, step)}


def unpinned_steps(folder: Path) -> set[int]:
    """Those that were pinned once, whether they are still there or not, until `forget_unpinned`."""
    marks = (MARK.fullmatch(path.name) for path in folder.glob("step-*.unpinned"))
    return {int(mark[1]) for mark in marks if mark} - pinned_steps(folder)


def forget_unpinned(folder: Path, step: int) -> None:
    _unpinned(folder, step).unlink(missing_ok=True)


def find_step(folder: Path, step: int) -> Path:
    """Raises FileNotFoundError, naming the steps that are there."""
    found = find_steps(folder)
    if step not in found:
        there = f"it has steps {', '.join(map(str, sorted(found)))}" if found else "it has no checkpoint"
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}: {there}")
    return found[step]


def check_whole(folder: Path, step: int) -> None:
    """Raises FileNotFoundError or ValueError where `step` is no whole checkpoint."""
    path = find_step(folder, step)
    if problems := Manifest.read(path).quick_problems(path):
        raise ValueError(f"step {step} is not whole: {problems[0]}; choose another step")


def rewind(folder: Path, step: int, also: Sequence[Path] = ()) -> Path | None:
    """Set all checkpoints after `step` aside, so that the run goes on from there; returns the folder they are in.

    None: there are none. also: files that a resume cuts back, copied into the same folder. The run must not be going.
    Killed in the middle, the newest are aside and a repetition does the rest. Raises FileNotFoundError or ValueError
    where `step` is no whole checkpoint.
    """
    check_whole(folder, step)
    newer = {other: place for other, place in find_steps(folder).items() if other > step}
    if not newer:
        return None
    aside = folder / f"rewound-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    aside.mkdir()
    for file in also:
        if file.exists():
            shutil.copy2(file, aside / file.name)
    for other in sorted(newer, reverse=True):  # the newest one that is left is always where a start would go on
        newer[other].rename(aside / step_folder(folder, other).name)
        if is_pinned(folder, other):
            pin_file(folder, other).rename(pin_file(aside, other))
        fsync(folder)
    fsync(aside)
    return aside


def pin_file(folder: Path, step: int) -> Path:
    return step_folder(folder, step).with_suffix(".pinned")


def _unpinned(folder: Path, step: int) -> Path:
    return step_folder(folder, step).with_suffix(".unpinned")

"""All layouts of a number of processes, and how a layout is written in a line."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from parallel.mesh import AXES, ParallelConfig

CP_METHODS = ("ulysses", "ring")


def all_layouts(parallel: ParallelConfig, processes: int, schedules: Sequence[str]) -> list[ParallelConfig]:
    """Every way to write `processes` as a product of the degrees, with both methods where cp > 1 and every schedule
    where pp > 1. What `parallel` says besides stays; whether a model can have a layout is not asked here.
    """
    found = []
    for degrees in _factors(processes, len(AXES)):
        values: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        for method in CP_METHODS if values["cp"] > 1 else (parallel.cp_method,):
            for schedule in schedules if values["pp"] > 1 else (parallel.schedule,):
                chosen = {"cp_method": method, "schedule": schedule, "stages_per_rank": 0, "stage_layers": ()}
                found.append(parallel.model_copy(update={**values, **chosen}))
    return found


def describe_layout(parallel: ParallelConfig) -> str:
    """Such as "pp 2 (1f1b) x dp_shard 2 x cp 2 (ring)"."""
    notes = {"pp": parallel.schedule, "cp": parallel.cp_method}
    written = [
        f"{axis} {degree}" + (f" ({notes[axis]})" if axis in notes else "")
        for axis in AXES
        if (degree := getattr(parallel, axis)) != 1
    ]
    return " x ".join(written) or "one process"


def axes_alone(parallel: ParallelConfig) -> list[ParallelConfig]:
    """For a layout of several axes above 1, those of each of them without the others."""
    wide = [axis for axis in AXES if getattr(parallel, axis) > 1]
    alone = dict.fromkeys(AXES, 1)
    return [parallel.model_copy(update={**alone, axis: getattr(parallel, axis)}) for axis in wide if len(wide) > 1]


def features(parallel: ParallelConfig) -> set[str]:
    """What a layout has that others may lack: its axes above 1, its method, its schedule."""
    found = {f"parallel.{axis} > 1" for axis in AXES if getattr(parallel, axis) != 1}
    if parallel.cp > 1:
        found.add(f"parallel.cp_method = {parallel.cp_method}")
    if parallel.pp > 1:
        found.add(f"parallel.schedule = {parallel.schedule}")
    return found


def suspects(failed: Iterable[set[str]], passed: Iterable[set[str]]) -> tuple[list[str], list[str]]:
    """Features that every failed layout has: those that no passed one has, and the others."""
    common = set.intersection(*failed) if (failed := list(failed)) else set()
    seen = set().union(*passed)
    return sorted(common - seen), sorted(common & seen)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield (first, *rest)

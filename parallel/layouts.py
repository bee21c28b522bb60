"""All layouts of a number of processes, and how a layout is written in a line."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from parallel.mesh import AXES, ParallelConfig

CP_METHODS = ("ulysses", "ring")


def all_layouts(
    parallel: ParallelConfig, processes: int, schedules: Sequence[str], experts: int = 0
) -> list[ParallelConfig]:
    """Every way to write `processes` as a product of the degrees, with both methods where cp > 1 and every schedule
    where pp > 1; with `experts`, every ep that divides them, and experts cut and whole where tp > 1. What `parallel`
    says besides stays; whether a model can have a layout is not asked here.
    """
    found = []
    for degrees in _factors(processes, len(AXES)):
        values: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        shared = math.gcd(values["dp_shard"] * values["cp"], experts) if experts else 1
        expert_parts = [
            {"ep": ep, "expert_tp": over_tp}
            for ep in range(1, shared + 1)
            if shared % ep == 0
            for over_tp in ((True, False) if experts and values["tp"] > 1 else (parallel.expert_tp,))
        ]
        for method in CP_METHODS if values["cp"] > 1 else (parallel.cp_method,):
            for schedule in schedules if values["pp"] > 1 else (parallel.schedule,):
                chosen = {"cp_method": method, "schedule": schedule, "stages_per_rank": 0, "stage_layers": ()}
                found += [parallel.model_copy(update={**values, **chosen, **part}) for part in expert_parts]
    return found


def describe_layout(parallel: ParallelConfig) -> str:
    """Such as "pp 2 (1f1b) x dp_shard 2 x cp 2 (ring)"."""
    notes = {"pp": parallel.schedule, "cp": parallel.cp_method}
    written = [
        f"{axis} {degree}" + (f" ({notes[axis]})" if axis in notes else "")
        for axis in AXES
        if (degree := getattr(parallel, axis)) != 1
    ]
    experts = ["whole experts"] if not parallel.expert_tp else []
    experts += [f"ep {parallel.ep}"] if parallel.ep > 1 else []
    return ", ".join([" x ".join(written) or "one process", *experts])


def axes_alone(parallel: ParallelConfig) -> list[ParallelConfig]:
    """For a layout of several axes above 1, those of each of them without the others."""
    wide = [axis for axis in AXES if getattr(parallel, axis) > 1]
    alone = {**dict.fromkeys(AXES, 1), "ep": 1}
    parts = [{axis: getattr(parallel, axis)} for axis in wide]
    if parallel.ep > 1:
        parts.append({"dp_shard": parallel.ep, "ep": parallel.ep})
    return [parallel.model_copy(update={**alone, **part}) for part in parts if len(parts) > 1]


def features(parallel: ParallelConfig) -> set[str]:
    """What a layout has that others may lack: its axes above 1, its method, its schedule."""
    found = {f"parallel.{axis} > 1" for axis in (*AXES, "ep") if getattr(parallel, axis) != 1}
    if not parallel.expert_tp:
        found.add("parallel.expert_tp = false")
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

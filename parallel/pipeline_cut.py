"""Which pipeline stage has which layers, and which process which stage: all that can be known before a model runs."""

from collections.abc import Sequence
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

from parallel.mesh import ParallelConfig
from parallel.plan import Plan, match_modules

# A process r of these has stages r and 2 pp - 1 - r, so that the last stage sits beside the first; other schedules with
# several stages a process deal them out in turns: r, r + pp, ...
V_SHAPED = ("zbvzerobubble", "dualpipev")


def schedule_class(name: str) -> type[Any]:
    """torch's schedule called `name`, case ignored. Raises ValueError that lists them for an unknown one."""
    known = schedule_names()
    if name.lower() not in known:
        raise ValueError(f"parallel.schedule = {name!r} is unknown: one of {', '.join(known)}")
    return get_schedule_class(name)


def schedule_names() -> list[str]:
    """Of all schedules that this torch has, in lower case."""
    found: list[type[Any]] = [PipelineScheduleSingle, PipelineScheduleMulti]
    for cls in found:
        found.extend(cls.__subclasses__())
    return sorted({cls.__name__.removeprefix("Schedule").lower() for cls in found if cls.__name__.startswith("Sched")})


def num_stages(options: ParallelConfig, pp: int, layers: int) -> int:
    """Pipeline stages of all `pp` processes together. Raises ValueError where the schedule or the model cannot."""
    name, asked, by_hand = options.schedule.lower(), options.stages_per_rank, len(options.stage_layers)
    if issubclass(schedule_class(name), PipelineScheduleSingle):
        needed: int | None = 1
    else:
        needed = 2 if name in V_SHAPED else None
    if needed is not None and asked not in (0, needed):
        raise ValueError(
            f"parallel.stages_per_rank = {asked}, but parallel.schedule = {name!r} has {needed} a process; "
            f"set it to {needed} or leave it out"
        )
    turns = by_hand // pp if by_hand and by_hand % pp == 0 else max(1, min(2, layers // pp))
    each = needed or asked or turns
    if pp * each > layers:
        stages = f"{each} stages" if each > 1 else "1 stage"
        raise ValueError(
            f"parallel.pp = {pp} with {stages} a process (parallel.schedule = {name!r}) needs at least {pp * each} "
            f"layers, but the model has {layers}; set parallel.pp to {max(1, layers // each)} or less"
        )
    return pp * each


def stages_of(schedule: str, pp_rank: int, pp: int, stages: int) -> list[int]:
    """Indices of the stages that process `pp_rank` of `pp` has, in ascending order; `stages` of all together."""
    if schedule.lower() in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return list(range(pp_rank, stages, pp))


def owner_of(schedule: str, stage: int, pp: int) -> int:
    """The process that has `stage`; inverse of `stages_of`."""
    return 2 * pp - 1 - stage if schedule.lower() in V_SHAPED and stage >= pp else stage % pp


def cut_by_hand(stage_layers: Sequence[int], layers: int, stages: int) -> list[range]:
    """Layers of each stage from `parallel.stage_layers`. Raises ValueError where they do not fit."""
    written = list(stage_layers)
    if len(written) != stages:
        raise ValueError(
            f"parallel.stage_layers = {written} has {len(written)} entries, but needs {stages}: the number of layers "
            "of each pipeline stage"
        )
    if sum(written) != layers or min(written) < 0 or (stages > 1 and 0 in written[1:-1]):
        raise ValueError(
            f"parallel.stage_layers = {written} sums to {sum(written)}; it must share out the model's {layers} layers, "
            "at least 1 a stage; the first may have none beside the embedding or tower, the last none beside the head"
        )
    return [range(sum(written[:stage]), sum(written[: stage + 1])) for stage in range(stages)]


def cut_layers(costs: Sequence[float], stages: int, head_cost: float = 0.0, embed_cost: float = 0.0) -> list[range]:
    """Contiguous layers of each stage, at least one each, such that the slowest stage is as fast as can be.

    costs: of each layer; `embed_cost` is added to the first stage, `head_cost` to the last. Among cuts with the same
    slowest stage one with even stages is taken. Exact: a dynamic programme over (stages, layers).
    """
    layers = len(costs)
    assert 1 <= stages <= layers, f"{stages} stages of {layers} layers"
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(stage: int, start: int, end: int) -> float:
        return before[end] - before[start] + embed_cost * (stage == 0) + head_cost * (stage == stages - 1)

    # best[end]: (slowest stage, sum of squares, starts of the stages) of the stages so far, which have layers 0 to end
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        rest = stages - stage - 1
        ends = range(stage + 1, layers - rest + 1) if rest else [layers]
        longer = {}
        for end in ends:
            choices = []
            for start, (slowest, squares, starts) in best.items():
                if start < end:
                    cost = cost_of(stage, start, end)
                    choices.append((max(slowest, cost), squares + cost * cost, (*starts, start)))
            longer[end] = min(choices)
        best = longer
    starts = (*best[layers][2], layers)
    return [range(start, end) for start, end in pairwise(starts)]


def plan_stages(model: Any, plan: Plan, options: ParallelConfig, pp: int, seq_len: int) -> list[range]:
    """Layers of every stage of `model` (whole, may be on meta), by hand or balanced by estimated cost."""
    blocks = match_modules(model, plan.blocks)
    stages = num_stages(options, pp, len(blocks))
    if options.stage_layers:
        return cut_by_hand(options.stage_layers, len(blocks), stages)
    ends = {name: module for name, module in model.named_children() if name in (*plan.first, *plan.last)}
    first, last = ([matrix_flops(ends[name]) for name in names if name in ends] for names in (plan.first, plan.last))
    costs = [matrix_flops(block) + attention_flops(block, plan, seq_len) for block in blocks.values()]
    return cut_layers(costs, stages, sum(last), sum(first))


def matrix_flops(module: nn.Module) -> float:
    """FLOPs a token, forward and backward: 6 a matrix element (Kaplan et al. 2020, arXiv:2001.08361). An embedding is
    a lookup and costs none.
    """
    return 6.0 * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def attention_flops(block: nn.Module, plan: Plan, seq_len: int) -> float:
    """FLOPs a token of attention in a block, forward and backward, half of the row seen: 6 S H D.

    H D is the input width of the row-cut projection beside each attention core.
    """
    flops = 0.0
    cores = match_modules(block, plan.attention.removeprefix(f"{plan.blocks}.")) if plan.attention else {}
    for core in cores:
        owner = core.rpartition(".")[0]
        for pattern, style in plan.tensor.items():
            inside, _, leaf = pattern.removeprefix(f"{plan.blocks}.").rpartition(".")
            if style == "row" and inside == owner:
                flops += 6.0 * seq_len * int(block.get_submodule(f"{owner}.{leaf}").in_features)  # type: ignore[arg-type]
    return flops


def cut(model: Any, plan: Plan, layers: range, *, first: bool, last: bool) -> None:
    """Leave of `model` one stage, in place: `layers` (by position), and what only the first or last stage has.

    Names stay. A head that is tied to the embedding of another stage keeps a parameter of its own.
    """
    container, _, star = plan.blocks.rpartition(".")
    assert star == "*", f"stages are cut between the entries of one ModuleDict, not {plan.blocks!r}"
    blocks = model.get_submodule(container)
    for position, key in enumerate(list(blocks)):
        if position not in layers:
            del blocks[key]
    for names, keep in ((plan.first, first), (plan.last, last)):
        for name in names:
            if not keep:
                setattr(model, name, None)


def check_microbatches(
    options: ParallelConfig, pp: int, stages: int, global_batch: int, micro_batch: int, data: int
) -> None:
    """Raises ValueError where the micro-batches of a step on one of `data` data ranks are not what the schedule needs.

    The schedule itself is asked, so that this holds for all that torch has.
    """
    count = global_batch // (micro_batch * data)
    if pp == 1 or _runs(options.schedule, pp, stages, count):
        return
    candidates = sorted(range(1, max(count, 2 * stages) + stages), key=lambda n: abs(n - count))
    near = sorted(islice((n for n in candidates if _runs(options.schedule, pp, stages, n)), 2))
    cures = [f"train.global_batch = {' or '.join(str(n * micro_batch * data) for n in near)}"]
    smaller = [micro_batch * count // n for n in near if n > count and micro_batch * count % n == 0]
    if smaller:
        cures.append(f"train.micro_batch = {smaller[0]}")
    where = f"parallel.schedule = {options.schedule!r} with parallel.pp = {pp} ({stages} stages)"
    raise ValueError(
        f"train.global_batch = {global_batch} with train.micro_batch = {micro_batch} is {count} micro-batches a step "
        f"on each of {data} data ranks, but {where} needs {' or '.join(map(str, near))}; "
        f"set {', or '.join(cures)}, or lower parallel.pp"
    )


def _runs(schedule: str, pp: int, stages: int, microbatches: int) -> bool:
    """Whether torch can make the schedule: tried with stages that only know their place."""
    if not microbatches:
        return False
    held = stages_of(schedule, 0, pp, stages)
    fakes = [SimpleNamespace(num_stages=stages, group_size=pp, group_rank=0, stage_index=s, submod=None) for s in held]
    cls = schedule_class(schedule)
    try:
        cls(fakes[0] if issubclass(cls, PipelineScheduleSingle) else fakes, microbatches)
    except (ValueError, RuntimeError, AssertionError, IndexError, KeyError):
        return False
    return True

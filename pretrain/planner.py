"""`pretrain plan`: the recipe's model, batch, engine and budget put to the planner of `parallel`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import torch

from parallel.context import Method, check_context
from parallel.mesh import AXES
from parallel.pipeline_cut import check_microbatches, plan_stages
from parallel.plan import match_modules
from parallel.planner.gpus import GIB, GPUS, Gpu
from parallel.planner.layout import Layout, Part, Program, parts_of
from parallel.planner.search import MARGIN, Planned, Sized, Space, fitting, search
from parallel.planner.shape import read_shape
from parallel.tensor import check_tensor
from pretrain.config import Origins, RunConfig
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.planner_engines import check_places, make_program, megatron_check, megatron_cuts, pin

NEAREST = 64  # how far from an impossible number of GPUs a possible one is looked for
MORE = (2, 4, 8, 16, 32, 64)  # times as many GPUs, tried where nothing fits
BY_TOKENS = ("activations", "recomputed layer", "logits")  # terms of memory that a shorter sequence makes smaller
KNOWN_SCHEDULES = ("1f1b", "gpipe", "interleaved1f1b")  # of which the search knows what they need


@dataclass(frozen=True)
class Question:
    """What is planned: a recipe on so many GPUs."""

    config: RunConfig
    model: Any
    space: Space
    program: Program


def ask(config: RunConfig, origins: Origins, gpus: int, gpu: Gpu) -> Question:
    """Raises ValueError for what cannot be planned."""
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    if config.train.precision == "fp64":
        raise ValueError('train.precision = "fp64" is for proving layouts; set it to bf16 or fp32 to plan')
    check_places(config)
    if not config.model.vocab_size:
        raise ValueError("model.vocab_size = 0 is left to the data's tokenizer; set model.vocab_size to plan")
    if "tokens" not in OBJECTIVES[config.objective.name][1].sequence:
        raise ValueError(
            f'objective.name = "{config.objective.name}" cannot be planned: the planner counts models with a head over '
            "tokens; spread it with parallel.dp_shard = -1 and measure a short run"
        )
    family, seq_len = FAMILIES[config.model.family], config.data.seq_len
    with torch.device("meta"):
        model = family.build(config.model)
    plan, moe = family.plan(config.model), getattr(config.model, "moe", None)
    scores = config.model.attention_flops_per_token(seq_len)
    shape = read_shape(model, plan, seq_len, scores, moe.top_k if moe is not None else 0)
    pinned = _pinned(config, origins, gpus)
    methods = _cp_methods(config, model, plan.attention)
    question = Question(
        config,
        model,
        Space(shape, plan, gpus, gpu, config.train.global_batch, pinned, methods, fsdp=config.engine == "torch"),
        make_program(config),
    )
    _check_pinned(question)
    return question


def _cp_methods(config: RunConfig, model: Any, attention: str) -> tuple[Method, ...]:
    """What ring attention on GPUs refuses (see `parallel.context`) leaves ulysses."""
    cores = match_modules(model, attention).values() if attention else ()
    windowed = bool(getattr(config.model, "window", 0))
    if windowed or config.train.precision != "bf16" or any(getattr(core, "softcap", None) for core in cores):
        return ("ulysses",)
    return "ulysses", "ring"


def _pinned(config: RunConfig, origins: Origins, gpus: int) -> dict[str, Any]:
    """Fields of `Layout` that are not varied: what the command line sets, and what only the recipe can know."""
    given = {key for key, origin in origins.items() if origin.startswith("override")}
    found: dict[str, Any] = {
        "recompute_every": config.train.recompute_every,
        "expert_tp": config.parallel.expert_tp,
    }
    for name in (*AXES, "ep", "cp_method", "schedule"):
        value = getattr(config.parallel, name)
        if f"parallel.{name}" in given and value != -1:
            found[name] = value.lower() if isinstance(value, str) else value
    for name in (*AXES, "ep"):
        degree = found.get(name, 1)
        if degree < 1 or gpus % degree:
            near = sorted((d for d in range(1, gpus + 1) if gpus % d == 0), key=lambda d: abs(d - degree))[:3]
            cure = " or ".join(map(str, sorted(near)))
            raise ValueError(f"parallel.{name} = {degree} does not divide --gpus {gpus}; set it to {cure}")
    if "parallel.stages_per_rank" in given:
        found["chunks"] = max(1, config.parallel.stages_per_rank)
    if "parallel.reshard_after_forward" in given:
        found["keep"] = not config.parallel.reshard_after_forward
    for name in ("micro_batch", "recompute"):
        if f"train.{name}" in given:
            found[name] = getattr(config.train, name)
    return pin(config, found, gpus)


def _check_pinned(question: Question) -> None:
    """The run's own checks of what the user has set, whose errors say more than that no layout is possible."""
    space, parallel = question.space, question.config.parallel
    pinned, seq_len, plan = space.pinned, space.shape.seq_len, space.plan
    tp, cp = pinned.get("tp", 1), pinned.get("cp", 1)
    check_tensor(plan, tp, seq_len // cp)
    method = pinned.get("cp_method", "ring" if cp > 1 and "ring" in space.cp_methods else "ulysses")
    if method not in space.cp_methods:
        raise ValueError(
            'parallel.cp_method = "ring" cannot do sliding windows, a softcap or fp32 on GPUs; set it to "ulysses"'
        )
    check_context(seq_len, cp, method, plan.heads, tp)
    if question.config.engine == "megatron":
        chunks = pinned.get("chunks", 2 if pinned.get("schedule") == "interleaved1f1b" else 1)
        known = {name: value for name, value in pinned.items() if name != "keep"}
        megatron_check(question.config)(Layout(**known | {"chunks": chunks, "cp_method": method}))
    elif "pp" in pinned and pinned["pp"] > 1:
        plan_stages(question.model, plan, parallel, pinned["pp"], seq_len)


def answer(question: Question) -> list[Planned]:
    """Layouts that fit, best first. Raises ValueError where none is legal or none fits, with what would help."""
    found, smallest = search(question.space, question.program, stage_cuts(question))
    if smallest is None:
        raise ValueError(_impossible(question))
    runnable = [planned for planned in found[:20] if _runs(question, planned)]
    if not runnable:
        raise ValueError(_too_large(question, smallest))
    return runnable


def _too_large(question: Question, smallest: Sized) -> str:
    space, total = question.space, smallest.memory.total
    over = total - MARGIN * space.gpu.memory
    largest = max(smallest.memory.terms, key=lambda name: smallest.memory.terms[name])
    cures = []
    cut = stage_cuts(question)
    for more in MORE:
        larger = replace(space, gpus=space.gpus * more)
        ladders = ((ladder, cut(ladder[0])) for ladder in larger.ladders())
        if any(parts and fitting(larger, question.program, ladder, parts).fits for ladder, parts in ladders):
            cures.append(f"--gpus {larger.gpus}")
            break
    roomy = [name for name, gpu in GPUS.items() if MARGIN * gpu.memory >= total]
    if roomy:
        cures.append(f"--gpu {min(roomy, key=lambda name: GPUS[name].memory)}")
    if largest in BY_TOKENS:
        cures.append("a shorter data.seq_len")
    return (
        f"nothing fits into {space.gpus} x {space.gpu.name}: the smallest layout ({to_overrides(question, smallest)}) "
        f"needs {total / GIB:.1f} GiB a GPU, {over / GIB:.1f} GiB more than {100 * MARGIN:.0f} % of its "
        f"{space.gpu.memory / GIB:.0f} GiB, most of it {largest}; take {' or '.join(cures) or 'a smaller model'}"
    )


def _impossible(question: Question) -> str:
    space, near = question.space, []
    for distance in range(1, NEAREST):
        for gpus in (space.gpus - distance, space.gpus + distance):
            if gpus > 0 and next(replace(space, gpus=gpus).ladders(), None) is not None:
                near.append(gpus)
        if len(near) >= 2:
            break
    always = {"recompute_every", "expert_tp", *pin(question.config, {}, space.gpus)}
    given = {name: value for name, value in space.pinned.items() if name not in always}
    pinned = "".join(f", with {name} = {value}" for name, value in given.items())
    cure = f"take {' or '.join(map(str, sorted(near)))} GPUs, or change" if near else "change"
    return (
        f"--gpus {space.gpus}: no layout is possible{pinned}: train.global_batch = {space.global_batch} sequences must "
        "share out evenly over the data-parallel GPUs, and heads, layers and sequence over the others; "
        f"{cure} train.global_batch"
    )


def stage_cuts(question: Question) -> Callable[[Layout], tuple[Part, ...]]:
    """What each process of a pipeline has, cut as the run itself would; nothing where it would refuse."""
    shape, plan = question.space.shape, question.space.plan
    if question.config.engine == "megatron":
        return megatron_cuts(question.config, shape)

    @cache
    def parts(pp: int, schedule: str, chunks: int) -> tuple[Part, ...]:
        if pp == 1:
            return parts_of(shape, [range(len(shape.layers))], 1, schedule)
        update = {"pp": pp, "schedule": schedule, "stages_per_rank": chunks if chunks > 1 else 0}
        parallel = question.config.parallel.model_copy(update=update)
        try:
            stages = plan_stages(question.model, plan, parallel, pp, shape.seq_len)
        except ValueError:
            return ()
        return parts_of(shape, stages, pp, schedule)

    return lambda layout: parts(layout.pp, layout.schedule, layout.chunks)


def _runs(question: Question, planned: Planned) -> bool:
    """Whether torch can make the pipeline schedule; asking takes seconds where micro-batches are many."""
    layout, count = planned.layout, planned.setting.microbatches
    if layout.pp == 1 or layout.schedule in KNOWN_SCHEDULES or count > 64:
        return True
    parallel = question.config.parallel.model_copy(update={"pp": layout.pp, "schedule": layout.schedule})
    stages, batch = layout.pp * layout.chunks, question.config.train.global_batch
    try:
        check_microbatches(parallel, layout.pp, stages, batch, layout.micro_batch, layout.data)
    except ValueError:
        return False
    return True


def to_overrides(question: Question, planned: Sized) -> str:
    """What to add to `pretrain run RECIPE` to get this layout."""
    return " ".join(f"{key}={value}" for key, value in _settings(question, planned.layout))


SETTINGS = (
    *(f"parallel.{name}" for name in (*AXES, "ep", "cp_method", "schedule", "stages_per_rank")),
    "parallel.reshard_after_forward",
    "train.micro_batch",
    "train.recompute",
)  # keys that `to_overrides` may set


def _settings(question: Question, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Degrees of 1 and what does not matter are left out, unless recipe or command line say otherwise."""
    parallel = question.config.parallel
    for axis in (*AXES, "ep"):
        degree = getattr(layout, axis)
        if axis == "dp_shard" or degree != 1 or getattr(parallel, axis) != 1:
            yield f"parallel.{axis}", degree
    chunks = layout.chunks if layout.chunks > 1 else 0
    relevant = chain(
        [("cp_method", layout.cp_method)] if layout.cp > 1 else [],
        [("schedule", layout.schedule), ("stages_per_rank", chunks)] if layout.pp > 1 else [],
        [("reshard_after_forward", not layout.keep)] if layout.pp == 1 else [],
    )
    for name, value in relevant:
        default = type(parallel).model_fields[name].default
        if name in ("cp_method", "schedule") or value != default or getattr(parallel, name) != default:
            yield f"parallel.{name}", str(value).lower()
    yield "train.micro_batch", layout.micro_batch
    yield "train.recompute", layout.recompute
    config = question.config
    if config.engine == "deepspeed" and config.deepspeed.zero == 3 and config.train.compile != "off":
        yield "train.compile", "off"  # "auto" would turn it on

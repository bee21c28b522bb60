"""`pretrain plan`: the recipe's model, batch and budget put to the planner of `parallel`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from parallel.mesh import AXES
from parallel.pipeline_cut import check_microbatches, plan_stages, stages_of
from parallel.plan import Plan
from parallel.planner.gpus import Gpu
from parallel.planner.layout import Layout, Program
from parallel.planner.search import MARGIN, Planned, legal_layouts, search
from parallel.planner.shape import ModelShape, read_shape
from pretrain.config import Origins, RunConfig
from pretrain.models import FAMILIES

GIB = 2**30
NEAREST = 64  # how far from an impossible number of GPUs a possible one is looked for


@dataclass(frozen=True)
class Question:
    """What is planned: a recipe on so many GPUs. pinned: fields of `Layout` that the user has set."""

    config: RunConfig
    gpus: int
    gpu: Gpu
    model: Any
    plan: Plan
    shape: ModelShape
    program: Program
    pinned: dict[str, Any]


def ask(config: RunConfig, origins: Origins, gpus: int, gpu: Gpu) -> Question:
    """Raises ValueError for what cannot be planned."""
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    if config.train.precision != "bf16":
        raise ValueError(
            f"train.precision = {config.train.precision!r}: plans are made for bf16; set train.precision=bf16"
        )
    family = FAMILIES[config.model.family]
    model_config = config.model
    if not model_config.vocab_size:
        raise ValueError("model.vocab_size = 0 is left to the data's tokenizer; set model.vocab_size to plan")
    with torch.device("meta"):
        model = family.build(model_config)
    plan = family.plan(model_config)
    seq_len = config.data.seq_len
    shape = read_shape(model, plan, seq_len, model_config.attention_flops_per_token(seq_len))
    chunk = getattr(config.objective, "chunk_tokens", 0)
    compiled = config.train.compile != "off"
    muon = config.optim.name == "muon"
    program = Program(chunk=chunk, fused=compiled, layers_compiled=compiled, state=4.5 if muon else 8)
    return Question(config, gpus, gpu, model, plan, shape, program, _pinned(config, origins, gpus))


def _pinned(config: RunConfig, origins: Origins, gpus: int) -> dict[str, Any]:
    """Settings given on the command line."""
    given = {key for key, origin in origins.items() if origin.startswith("override")}
    found: dict[str, Any] = {}
    for name in (*AXES, "cp_method", "schedule"):
        value = getattr(config.parallel, name)
        if f"parallel.{name}" in given and value != -1:
            found[name] = value.lower() if isinstance(value, str) else value
    for name in AXES:
        degree = found.get(name, 1)
        if degree < 1 or gpus % degree:
            near = [d for d in range(1, gpus + 1) if gpus % d == 0]
            near = sorted(near, key=lambda d: abs(d - degree))[:3]
            raise ValueError(
                f"parallel.{name} = {degree} does not divide --gpus {gpus}; set it to {' or '.join(map(str, sorted(near)))}"
            )
    if "parallel.stages_per_rank" in given:
        found["chunks"] = max(1, config.parallel.stages_per_rank)
    if "parallel.reshard_after_forward" in given:
        found["keep"] = not config.parallel.reshard_after_forward
    for name in ("micro_batch", "recompute"):
        if f"train.{name}" in given:
            found[name] = getattr(config.train, name)
    return found


def answer(question: Question) -> list[Planned]:
    """Layouts that fit, fastest first. Raises ValueError where none is legal or none fits, with what would help."""
    config, gpu = question.config, question.gpu
    layouts = list(_legal(question, question.gpus))
    if not layouts:
        raise ValueError(_impossible(question))
    found, smallest = search(
        question.shape, layouts, question.program, gpu, config.train.global_batch, stage_counts(question)
    )
    runnable = [planned for planned in found[:20] if _runs(question, planned)]
    if runnable:
        return runnable
    assert smallest is not None
    over = smallest.memory.total - MARGIN * gpu.memory
    largest = max(smallest.memory.terms, key=lambda name: smallest.memory.terms[name])
    raise ValueError(
        f"nothing fits into {question.gpus} x {gpu.name}: the smallest layout ({to_overrides(smallest)}) needs "
        f"{smallest.memory.total / GIB:.1f} GiB a GPU, {over / GIB:.1f} GiB more than {100 * MARGIN:.0f} % of its "
        f"{gpu.memory / GIB:.0f} GiB, most of it {largest}; take more GPUs or larger ones, or a shorter data.seq_len"
    )


def _legal(question: Question, gpus: int):  # type: ignore[no-untyped-def]
    return legal_layouts(
        question.shape, question.plan, gpus, question.gpu, question.config.train.global_batch, question.pinned
    )


def _impossible(question: Question) -> str:
    near = []
    for distance in range(1, NEAREST):
        for gpus in (question.gpus - distance, question.gpus + distance):
            if gpus > 0 and next(_legal(question, gpus), None) is not None:
                near.append(gpus)
        if len(near) >= 2:
            break
    batch = question.config.train.global_batch
    pinned = "".join(f", with {name} = {value}" for name, value in question.pinned.items())
    cure = f"take {' or '.join(map(str, sorted(near)))} GPUs, or change" if near else "change"
    return (
        f"--gpus {question.gpus}: no layout is possible{pinned}: train.global_batch = {batch} sequences must share out "
        f"evenly over the data-parallel GPUs, and heads, layers and sequence over the others; {cure} train.global_batch"
    )


def stage_counts(question: Question) -> Callable[[Layout], list[list[int]]]:
    """Layout -> for each pipeline process, how many layers of each kind it has; cut as the run itself would."""

    @cache
    def count(pp: int, schedule: str, chunks: int) -> list[list[int]]:
        if pp == 1:
            return [question.shape.count_kinds(range(len(question.shape.layers)))]
        parallel = question.config.parallel.model_copy(
            update={"pp": pp, "schedule": schedule, "stages_per_rank": chunks if chunks > 1 else 0}
        )
        stages = plan_stages(question.model, question.plan, parallel, pp, question.shape.seq_len)
        held = [stages_of(schedule, rank, pp, len(stages)) for rank in range(pp)]
        return [question.shape.count_kinds(layer for stage in own for layer in stages[stage]) for own in held]

    return lambda layout: count(layout.pp, layout.schedule, layout.chunks)


def _runs(question: Question, planned: Planned) -> bool:
    """Whether torch can make the pipeline schedule; for common ones the search knows, and asking takes seconds."""
    layout = planned.layout
    if layout.schedule in ("1f1b", "gpipe", "interleaved1f1b") or planned.microbatches > 64:
        return True
    parallel = question.config.parallel.model_copy(update={"pp": layout.pp, "schedule": layout.schedule})
    try:
        check_microbatches(
            parallel,
            layout.pp,
            layout.pp * layout.chunks,
            question.config.train.global_batch,
            layout.micro_batch,
            layout.data,
        )
    except ValueError:
        return False
    return True


def to_overrides(planned: Planned) -> str:
    """What to add to `pretrain run RECIPE` to get this layout."""
    layout = planned.layout
    words = [
        f"parallel.{axis}={getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) != 1 or axis == "dp_shard"
    ]
    if layout.cp > 1:
        words.append(f"parallel.cp_method={layout.cp_method}")
    if layout.pp > 1:
        words.append(f"parallel.schedule={layout.schedule}")
        if layout.chunks > 1:
            words.append(f"parallel.stages_per_rank={layout.chunks}")
    elif layout.keep:
        words.append("parallel.reshard_after_forward=false")
    return " ".join([*words, f"train.micro_batch={layout.micro_batch}", f"train.recompute={layout.recompute}"])

"""All layouts that a model can have on N GPUs, and the fastest of those that fit."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from parallel.context import check_context
from parallel.pipeline_cut import V_SHAPED
from parallel.plan import Plan
from parallel.planner.gpus import KERNELS, Gpu, Kernels
from parallel.planner.layout import Layout, Program
from parallel.planner.memory import Memory, plan_memory, tensor_share
from parallel.planner.shape import ModelShape
from parallel.planner.step import Step, simulate
from parallel.tensor import check_tensor

MARGIN = 0.95  # of a GPU's memory that a plan may fill: predictions of memory are off by about as much
MAX_TP, MAX_CP = 16, 16
MIN_TOKENS = 1024  # of a sequence on a process, below which cutting it further cannot pay
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
POLICIES = ("none", "selective", "full")

Stages = Callable[[Layout], list[list[int]]]


@dataclass(frozen=True)
class Planned:
    """A layout with what it needs and how fast it is."""

    layout: Layout
    microbatches: int
    memory: Memory
    step: Step

    def fits(self, gpu: Gpu) -> bool:
        return self.memory.total <= MARGIN * gpu.memory


def own_program(layout: Layout, program: Program) -> Program:
    """This project's program under a layout: in a pipeline parameters stay gathered and gradients travel once a step."""
    return replace(program, once=layout.pp > 1)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def legal_layouts(
    shape: ModelShape, plan: Plan, gpus: int, gpu: Gpu, global_batch: int, pinned: dict[str, Any]
) -> Iterator[Layout]:
    """pinned: fields of `Layout` that are not to be varied; `micro_batch` and `recompute` among them."""

    def choices(name: str, values: Iterable[Any]) -> list[Any]:
        return [pinned[name]] if name in pinned else list(values)

    for tp in choices("tp", (d for d in divisors(gpus) if d <= min(MAX_TP, gpu.domain))):
        for cp in choices("cp", (d for d in divisors(gpus) if d <= MAX_CP and shape.seq_len // d >= MIN_TOKENS)):
            for method in choices("cp_method", ("ulysses", "ring") if cp > 1 else ("ulysses",)):
                if _whole(shape, plan, tp, cp, method):
                    for pp in choices("pp", (d for d in divisors(gpus) if d <= len(shape.layers))):
                        if gpus % (pp * tp * cp) == 0 and pp <= len(shape.layers):
                            base = Layout(pp=pp, cp=cp, tp=tp, cp_method=method)
                            yield from _over_data(base, shape, gpus // (pp * tp * cp), gpu, global_batch, choices)


def _over_data(
    base: Layout, shape: ModelShape, data: int, gpu: Gpu, global_batch: int, choices: Callable[..., list[Any]]
) -> Iterator[Layout]:
    if global_batch % data:
        return
    a_domain = max(1, gpu.domain // (base.tp * base.cp))
    for dp_shard in choices("dp_shard", (d for d in divisors(data) if d == data or d % a_domain == 0 or d == a_domain)):
        if dp_shard < 1 or data % dp_shard:
            continue
        for dp_replicate in choices("dp_replicate", (data // dp_shard,)):
            layout = replace(base, dp_shard=dp_shard, dp_replicate=dp_replicate)
            if dp_shard * dp_replicate != data or not _even(shape, layout):
                continue
            sizes = (m for m in MICRO_BATCHES if m * data <= global_batch and global_batch % (m * data) == 0)
            for micro in choices("micro_batch", sizes):
                if global_batch % (micro * data):
                    continue
                for schedule, chunks in _schedules(layout, shape, global_batch // (data * micro), choices):
                    for recompute, keep in product(choices("recompute", POLICIES), choices("keep", (False, True))):
                        if (layout.pp > 1 and not keep) or (layout.pp == 1 and keep and layout.shards == 1):
                            continue
                        yield replace(
                            layout, micro_batch=micro, schedule=schedule, chunks=chunks, recompute=recompute, keep=keep
                        )


def _schedules(layout: Layout, shape: ModelShape, microbatches: int, choices: Any) -> Iterator[tuple[str, int]]:
    if layout.pp == 1:
        yield "1f1b", 1
        return
    for schedule in choices("schedule", ("1f1b", "interleaved1f1b")):
        deepest = len(shape.layers) // layout.pp
        several = (d for d in (2, 4) if d <= deepest) if schedule == "interleaved1f1b" else (1,)
        if schedule in V_SHAPED or schedule in ("interleavedzerobubble", "loopedbfs"):
            several = iter((2,) if deepest >= 2 else ())
        for chunks in choices("chunks", several):
            rounds = max(1, microbatches // layout.pp)
            if microbatches >= layout.pp and (chunks == 1 or microbatches % rounds == 0):
                yield schedule, chunks


def _whole(shape: ModelShape, plan: Plan, tp: int, cp: int, method: str) -> bool:
    """Whether heads and sequence can be cut so."""
    try:
        check_tensor(plan, tp, shape.seq_len // cp)
        check_context(shape.seq_len, cp, method, plan.heads, tp)
    except ValueError:
        return False
    return True


def _even(shape: ModelShape, layout: Layout) -> bool:
    """FSDP cuts rows that tensor parallelism has cut only evenly, else columns (see `parallel.fsdp`)."""
    if layout.tp == 1 or layout.shards == 1:
        return True
    parameters = [p for layer in shape.layer_kinds for p in layer.parameters] + [*shape.first, *shape.last]
    for p in parameters:
        cut_rows = p.style != "row" and tensor_share(p, shape, layout.tp) > 1
        if cut_rows and p.shape[0] % (layout.tp * layout.shards) and (len(p.shape) < 2 or p.shape[1] % layout.shards):
            return False
    return True


def evaluate(
    shape: ModelShape,
    layout: Layout,
    program: Program,
    gpu: Gpu,
    global_batch: int,
    stages: Stages,
    kernels: Kernels = KERNELS,
) -> Planned:
    """Memory and time of one layout."""
    program, cut = own_program(layout, program), stages(layout)
    count = global_batch // (layout.data * layout.micro_batch)
    memory = plan_memory(shape, layout, program, count, cut)
    return Planned(layout, count, memory, simulate(shape, layout, program, gpu, global_batch, cut, kernels))


def _order(planned: Planned) -> tuple[float, int, float]:
    """Fastest first; what differs by less than the model can tell, half a percent, by how few axes it has."""
    layout = planned.layout
    axes = sum(d > 1 for d in (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp))
    return round(math.log(planned.step.seconds) / 0.005), axes, planned.step.seconds


def search(
    shape: ModelShape, layouts: Iterable[Layout], program: Program, gpu: Gpu, global_batch: int, stages: Stages
) -> tuple[list[Planned], Planned | None]:
    """The fastest variant of each set of degrees that fits, fastest first; and the one that needs least memory."""
    best: dict[tuple[int, ...], Planned] = {}
    smallest: tuple[float, Layout] | None = None
    for layout in layouts:
        own, cut = own_program(layout, program), stages(layout)
        count = global_batch // (layout.data * layout.micro_batch)
        memory = plan_memory(shape, layout, own, count, cut)
        if smallest is None or memory.total < smallest[0]:
            smallest = memory.total, layout
        if memory.total > MARGIN * gpu.memory:
            continue
        planned = Planned(layout, count, memory, simulate(shape, layout, own, gpu, global_batch, cut))
        degrees = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        if degrees not in best or planned.step.seconds < best[degrees].step.seconds:
            best[degrees] = planned
    found = sorted(best.values(), key=_order)
    return found, evaluate(shape, smallest[1], program, gpu, global_batch, stages) if smallest else None

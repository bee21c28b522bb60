"""All layouts that a model can have on N GPUs, and the fastest of those that fit."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from parallel.context import check_context
from parallel.pipeline_cut import V_SHAPED
from parallel.plan import Plan
from parallel.planner.gpus import Gpu
from parallel.planner.layout import Layout, Part, Program, Setting
from parallel.planner.memory import Memory, plan_memory
from parallel.planner.pieces import layout_degrees, shard_dim
from parallel.planner.shape import ModelShape, Parameter
from parallel.planner.step import Step, simulate
from parallel.tensor import check_tensor

MARGIN = 0.95  # of a GPU's memory that a plan may fill: predictions of memory are off by about as much
CLOSE = 1.02  # layouts whose steps are no longer than this share of the fastest's are told apart by how simple they are
COMPLEXITY = {"dp_shard": 1, "dp_replicate": 1, "tp": 2, "cp": 2, "ep": 2, "pp": 3}  # of an axis, to who runs it
MAX_TP, MAX_CP = 16, 16
MIN_TOKENS = 1024  # of a sequence on a process, below which cutting it further cannot pay
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
POLICIES = ("none", "selective", "full")  # fastest first

# Layout -> what each process of its pipeline has; nothing where the model cannot be cut so.
Cut = Callable[[Layout], tuple[Part, ...]]


@dataclass(frozen=True)
class Sized:
    """A layout with what it needs."""

    setting: Setting
    memory: Memory

    @property
    def layout(self) -> Layout:
        return self.setting.layout

    @property
    def fits(self) -> bool:
        return self.memory.total <= MARGIN * self.setting.gpu.memory


@dataclass(frozen=True)
class Planned(Sized):
    """And how fast it is."""

    step: Step


@dataclass(frozen=True)
class Space:
    """What is searched. pinned: fields of `Layout` that are not varied. cp_methods: those that the model can have.
    fsdp: FSDP cuts parameters, each along a dim, and may keep them gathered."""

    shape: ModelShape
    plan: Plan
    gpus: int
    gpu: Gpu
    global_batch: int
    pinned: dict[str, Any]
    cp_methods: tuple[Literal["ulysses", "ring"], ...] = ("ulysses", "ring")
    fsdp: bool = True

    def choices(self, name: str, values: Iterable[Any]) -> list[Any]:
        return [self.pinned[name]] if name in self.pinned else list(values)

    def ladders(self) -> Iterator[tuple[Layout, ...]]:
        """All that are legal, in groups that differ in what is computed again only, fastest first. Pipelines may still
        be refused when stages are cut."""
        fixed = {name: self.pinned[name] for name in ("recompute_every", "expert_tp") if name in self.pinned}
        most_cp = min(MAX_CP, max(1, self.shape.seq_len // MIN_TOKENS))
        for tp, cp in product(
            self.choices("tp", (d for d in divisors(self.gpus) if d <= min(MAX_TP, self.gpu.domain))),
            self.choices("cp", (d for d in divisors(self.gpus) if d <= most_cp)),
        ):
            for method in self.choices("cp_method", self.cp_methods if cp > 1 else self.cp_methods[:1]):
                if not self._shareable(tp, cp, method):
                    continue
                for pp in self.choices("pp", (d for d in divisors(self.gpus) if d <= len(self.shape.layers))):
                    if self.gpus % (pp * tp * cp) == 0 and pp <= len(self.shape.layers):
                        yield from self._over_data(Layout(pp=pp, cp=cp, tp=tp, cp_method=method, **fixed))

    def _shareable(self, tp: int, cp: int, method: Literal["ulysses", "ring"]) -> bool:
        """Whether heads and sequence can be cut so."""
        try:
            check_tensor(self.plan, tp, self.shape.seq_len // cp)
            check_context(self.shape.seq_len, cp, method, self.plan.heads, tp)
        except ValueError:
            return False
        return True

    def _over_data(self, base: Layout) -> Iterator[tuple[Layout, ...]]:
        """With all ways to share data and experts, micro-batches, schedules and recomputation."""
        data = self.gpus // (base.pp * base.tp * base.cp)
        if self.global_batch % data:
            return
        domain = max(1, self.gpu.domain // (base.tp * base.cp))
        some = (d for d in divisors(data) if d == data or d % domain == 0 or domain % d == 0)
        for dp_shard in self.choices("dp_shard", some):
            if dp_shard < 1 or data % dp_shard:
                continue
            for dp_replicate in self.choices("dp_replicate", (data // dp_shard,)):
                if dp_shard * dp_replicate == data:
                    for ep in self.choices("ep", self._expert_degrees(dp_shard * base.cp)):
                        layout = replace(base, dp_shard=dp_shard, dp_replicate=dp_replicate, ep=ep)
                        if layout.shards % ep == 0 and self._even(layout):
                            yield from self._in_time(layout)

    def _expert_degrees(self, shards: int) -> list[int]:
        return [d for d in divisors(self.plan.experts or 1) if shards % d == 0]

    def _even(self, layout: Layout) -> bool:
        """Whether FSDP takes what other axes leave of each parameter."""
        if not self.fsdp or layout.shards == 1 or (layout.tp == 1 and layout.ep == 1):
            return True
        degrees = layout_degrees(layout, self.shape.kv_heads)
        return all(shard_dim(parameter, degrees) is not None for parameter in self._parameters())

    def _parameters(self) -> Iterator[Parameter]:
        for layer in self.shape.layer_kinds:
            yield from layer.parameters
        yield from (*self.shape.first, *self.shape.last)

    def _in_time(self, layout: Layout) -> Iterator[tuple[Layout, ...]]:
        sizes = (size for size in MICRO_BATCHES if self.global_batch % (size * layout.data) == 0)
        for micro_batch in self.choices("micro_batch", sizes):
            count, rest = divmod(self.global_batch, layout.data * micro_batch)
            if rest or count < 1:
                continue
            for schedule, chunks in self._schedules(layout, count):
                # In a pipeline parameters stay gathered; where nothing is gathered there is nothing to keep.
                both = (True,) if layout.pp > 1 else (True, False) if self.fsdp and layout.shards > 1 else (False,)
                for keep in self.choices("keep", both):
                    if keep in both:
                        times = {"micro_batch": micro_batch, "schedule": schedule, "chunks": chunks, "keep": keep}
                        policies = self.choices("recompute", POLICIES)
                        yield tuple(replace(layout, **times, recompute=policy) for policy in policies)

    def _schedules(self, layout: Layout, microbatches: int) -> Iterator[tuple[str, int]]:
        """Schedules and how many stages of each a process has."""
        if layout.pp == 1:
            yield "1f1b", 1
            return
        deepest = len(self.shape.layers) // layout.pp
        for schedule in self.choices("schedule", ("1f1b", "interleaved1f1b")):
            several: tuple[int, ...] = (1,)
            if schedule in V_SHAPED or schedule in ("interleavedzerobubble", "loopedbfs"):
                several = (2,)
            elif schedule == "interleaved1f1b":
                several = (2, 4)
            for chunks in self.choices("chunks", several):
                rounds = max(1, microbatches // layout.pp)
                if chunks <= deepest and microbatches >= layout.pp and (chunks == 1 or microbatches % rounds == 0):
                    yield schedule, chunks


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def fitting(space: Space, program: Program, ladder: tuple[Layout, ...], parts: tuple[Part, ...]) -> Sized:
    """The first layout of a ladder that fits; the one that needs least memory where none does."""
    found = []
    for layout in ladder:
        own = replace(program, once=layout.pp > 1)  # in a pipeline gradients travel once a step
        setting = Setting(space.shape, layout, own, space.gpu, space.global_batch, parts)
        found.append(Sized(setting, plan_memory(setting)))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda sized: sized.memory.total)


def search(space: Space, program: Program, cut: Cut) -> tuple[list[Planned], Sized | None]:
    """The fastest variant of each set of degrees that fits, best first; and the layout that needs least memory, None
    where no layout is legal."""
    best: dict[tuple[int, ...], Planned] = {}
    smallest: Sized | None = None
    for ladder in space.ladders():
        parts = cut(ladder[0])
        if not parts:
            continue
        sized = fitting(space, program, ladder, parts)
        if smallest is None or sized.memory.total < smallest.memory.total:
            smallest = sized
        if sized.fits:
            layout, step = sized.setting.layout, simulate(sized.setting)
            degrees = (layout.pp, layout.cp, layout.tp, layout.ep)
            if degrees not in best or step.seconds < best[degrees].step.seconds:
                best[degrees] = Planned(sized.setting, sized.memory, step)
    return in_order(list(best.values())), smallest


def in_order(found: list[Planned]) -> list[Planned]:
    """Fastest first; but those that are about as fast as the fastest come in the order of how simple they are."""
    if not found:
        return []
    limit = CLOSE * min(planned.step.seconds for planned in found)

    def order(planned: Planned) -> tuple[bool, int, float]:
        layout, close = planned.layout, planned.step.seconds <= limit
        weight = sum(size for axis, size in COMPLEXITY.items() if getattr(layout, axis) > 1)
        return not close, weight if close else 0, planned.step.seconds

    return sorted(found, key=order)

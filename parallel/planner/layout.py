"""A layout and a training program as plain values: what the planner's memory and time are functions of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from parallel.pipeline_cut import owner_of
from parallel.planner.gpus import KERNELS, Compute, Gpu, Kernels
from parallel.planner.shape import LayerShape, Matrix, ModelShape

Sharded = Literal["all", "gradients", "state", "none"]


@dataclass(frozen=True)
class Layout:
    """Degrees, outermost axis first, and what else changes time and memory. chunks: pipeline stages of a process. keep:
    gathered parameters stay until the backward pass (FSDP without resharding). recompute_every: of how many layers one
    recomputes. expert_tp: tensor parallelism cuts each expert."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: bool = True
    cp_method: Literal["ulysses", "ring"] = "ulysses"
    schedule: str = "1f1b"
    chunks: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    recompute_every: int = 1
    keep: bool = False

    @property
    def gpus(self) -> int:
        return self.pp * self.data * self.cp * self.tp

    @property
    def data(self) -> int:
        """Processes that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Processes that share one copy of the parameters of a stage."""
        return self.dp_shard * self.cp


@dataclass(frozen=True)
class Program:
    """How a training program computes and stores; the defaults are this project's torch engine, in bf16.

    compute: format of the layers' products.
    sharded: what is cut over `Layout.shards`: "all" (FSDP, ZeRO-3), "state" (ZeRO-1, a distributed optimizer),
        "gradients" (ZeRO-2: they are reduced with every micro-batch) or "none".
    Bytes a parameter: weight: of what is held. gathered: of what products read, where that is a copy of its own; ends:
        the same of embedding and head. gradient: of held gradients; reduced: of those on the wire. state: of the
        optimizer's moments (and master weights); matrix_state: of those of matrices in layers, 0 for the same. copies:
        of what autocast makes of matrices in layers, kept for backward; casts: moved in forward to make them.
    Bytes an element: residual: of the stream between layers; wire: of what tensor parallelism gathers in forward;
        saved: of what is kept for backward; logits: of all that a logit takes where they are not made in chunks.
    once: parameters and gradients travel once a step, not once a micro-batch.
    overlap: they do so beside compute; tp_overlap: so does what tensor and expert parallelism send.
    sequence: norms and the residual stream are cut over tensor parallelism too.
    regather: backward gathers the inputs of products again where tensor parallelism has cut them.
    flash: fused attention; native_attention: by kernels written for the newest generation of GPU.
    fused: elementwise work is compiled, or written as fused kernels; compiled: layers are compiled whole.
    chunk: tokens whose logits exist at once, 0 for all.
    matmul_share: share of products that "selective" computes again; attention_again: it computes attention only.
    dropout: its masks are kept. keeps_narrow: inputs of products in 8 bits are kept in 8 bits.
    buckets: bytes of communication buffers.
    scatter: gradients are reduce-scattered where they or the state are cut; else all-reduced, each keeping its part.
    flat: "all" cuts each parameter as one string of numbers, not along a dim. persistent: those of no more elements
        stay gathered. live: gathered elements that are kept where they are needed again so soon, 0: as FSDP does.
    """

    compute: Compute = "bf16"
    sharded: Sharded = "all"
    weight: float = 4
    gathered: float = 2
    ends: float = 4
    gradient: float = 4
    reduced: float = 4
    state: float = 8
    matrix_state: float = 0
    copies: float = 0
    casts: float = 0
    residual: float = 4
    wire: float = 4
    saved: float = 2
    logits: float = 10
    once: bool = False
    overlap: bool = True
    tp_overlap: bool = False
    sequence: bool = True
    regather: bool = False
    flash: bool = True
    native_attention: bool = False
    fused: bool = True
    compiled: bool = True
    chunk: int = 1024
    matmul_share: float = 0.0
    attention_again: bool = False
    dropout: bool = False
    keeps_narrow: bool = False
    buckets: float = 0.0
    scatter: bool = True
    flat: bool = False
    persistent: int = 0
    live: float = 0


@dataclass(frozen=True)
class Part:
    """What one process of a pipeline has. layers: how many of each of `ModelShape.layer_kinds`. first, last: whether it
    has what only the first or the last stage has. forward_sends, backward_sends: to other processes, a micro-batch."""

    layers: tuple[int, ...]
    first: bool = True
    last: bool = True
    forward_sends: int = 0
    backward_sends: int = 0


def parts_of(shape: ModelShape, stages: Sequence[Iterable[int]], pp: int, schedule: str) -> tuple[Part, ...]:
    """For each process of a pipeline, what it has. stages: layers of every stage of all processes."""
    last, parts = len(stages) - 1, []
    owners = [owner_of(schedule, stage, pp) for stage in range(len(stages))]
    for rank in range(pp):
        held = [stage for stage in range(len(stages)) if owners[stage] == rank]
        parts.append(
            Part(
                tuple(shape.count_kinds(layer for stage in held for layer in stages[stage])),
                0 in held,
                last in held,
                sum(stage < last and owners[stage + 1] != rank for stage in held),
                sum(stage > 0 and owners[stage - 1] != rank for stage in held),
            )
        )
    return tuple(parts)


@dataclass(frozen=True)
class Setting:
    """All that a step's memory and time depend on. parts: of the pipeline's processes, one without a pipeline."""

    shape: ModelShape
    layout: Layout
    program: Program
    gpu: Gpu
    global_batch: int
    parts: tuple[Part, ...]
    kernels: Kernels = KERNELS

    @property
    def microbatches(self) -> int:
        """Of a step, on one process."""
        return max(1, self.global_batch // (self.layout.data * self.layout.micro_batch))

    @property
    def tokens(self) -> float:
        """Of a micro-batch, in the part of the sequence that context parallelism leaves a process."""
        return self.layout.micro_batch * self.shape.seq_len / self.layout.cp

    @property
    def stream(self) -> float:
        """Width of the residual stream, or of the part of it that a process has for as many tokens."""
        return self.shape.hidden / (self.layout.tp if self.program.sequence else 1)


def local(matrix: Matrix, layout: Layout, layer: LayerShape) -> tuple[float, float]:
    """(inputs, outputs) of a matrix on one process."""
    tp = layout.tp
    if matrix.style == "row":
        return ceil(matrix.inputs / tp), matrix.outputs
    if matrix.style == "key_value":
        return matrix.inputs, matrix.outputs * kv_share(layer, tp)
    if matrix.style in ("column", "part_column", "head", "width_norm"):
        return matrix.inputs, ceil(matrix.outputs / tp)
    return matrix.inputs, matrix.outputs


def kv_share(layer: LayerShape, tp: int) -> float:
    """Share of the key/value heads that one of `tp` processes computes: those of its own query heads."""
    return 1 / tp if not layer.kv_heads or layer.kv_heads % tp == 0 else max(1, layer.kv_heads // tp) / layer.kv_heads


def in_flight(layout: Layout, microbatches: int) -> float:
    """Micro-batches, in units of all layers of a process, whose activations the fullest process holds at once.

    1F1B: as many as stages are below (Narayanan et al. 2021, arXiv:2104.04473, also for interleaving); GPipe: all;
    ZBV: as many as 1F1B (Qi et al. 2024, arXiv:2405.15362); DualPipeV: one more.
    """
    pp, name = layout.pp, layout.schedule.lower()
    if pp == 1:
        return 1
    if name in ("gpipe", "loopedbfs"):
        return microbatches
    if name == "dualpipev":
        return min(pp + 1, microbatches)
    if layout.chunks > 1 and name != "zbvzerobubble":
        return min(pp * (1 + (pp - 1) / (pp * layout.chunks)), microbatches)
    return min(pp, microbatches)


def bubble(setting: Setting) -> float:
    """Idle time of a process in a step, in units of one micro-batch through one process.

    (pp - 1) / chunks for 1F1B and GPipe. Zero-bubble schedules fill most of it with gradients of weights: a third is
    left where the three parts of the work are equal (Qi et al. 2023, arXiv:2401.10241; 2024, arXiv:2405.15362), if
    backward can be split: not where layers are compiled or recompute.
    """
    layout = setting.layout
    idle = (layout.pp - 1) / layout.chunks
    splits = layout.recompute == "none" and not setting.program.compiled
    if splits and layout.schedule.lower() in ("interleavedzerobubble", "zbvzerobubble", "dualpipev"):
        return idle / 3
    return idle

"""A layout and a training program as plain values: what the planner's memory and time are functions of."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from parallel.planner.gpus import Compute
from parallel.planner.shape import LayerShape, Matrix


@dataclass(frozen=True)
class Layout:
    """Degrees, outermost axis first, and what else changes time and memory. chunks: pipeline stages of a process. keep:
    gathered parameters stay until the backward pass (FSDP without resharding). recompute_every: of how many layers one
    recomputes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    cp_method: str = "ulysses"
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
    """How a training program computes and stores; the defaults are this project's own.

    compute: format of the layers' products. sharded: what is cut over `Layout.shards`: "all" (FSDP, ZeRO-3), "state"
    (ZeRO-1, a distributed optimizer), "gradients" (ZeRO-2) or "none". weight, gathered, gradient, reduced, state: bytes a
    parameter of what is held, of what products read where that is a copy of its own, of held gradients, of gradients on
    the wire, of master weights and moments together. residual: bytes of the stream between layers; wire: of what
    tensor parallelism gathers in forward; saved: of what is
    kept for backward. flash: fused attention. fused: elementwise work is compiled or written as fused kernels. sequence:
    norms and residual are cut over tensor parallelism too. once: gradients travel once a step, not once a micro-batch.
    overlap: gathers and reductions run beside compute. tp_overlap: so do those of tensor parallelism. chunk: tokens whose
    logits exist at once, 0 for all. matmul_share: share of products that "selective" computes again. dropout: masks kept.
    """

    compute: Compute = "bf16"
    sharded: Literal["all", "gradients", "state", "none"] = "all"
    weight: float = 4
    gathered: float = 2
    ends: float = 4
    gradient: float = 4
    reduced: float = 4
    state: float = 8
    residual: float = 4
    saved: float = 2
    wire: float = 4
    flash: bool = True
    fused: bool = True
    sequence: bool = True
    once: bool = False
    overlap: bool = True
    tp_overlap: bool = False
    chunk: int = 1024
    logits: float = 10.0
    matmul_share: float = 0.0
    attention_again: bool = False
    dropout: bool = False
    layers_compiled: bool = True
    native_attention: bool = False
    regather: bool = False
    buckets: float = 0.0
    keeps_narrow: bool = False


def local(matrix: Matrix, layout: Layout, layer: LayerShape) -> tuple[float, float]:
    """(inputs, outputs) of a matrix on one process."""
    tp = layout.tp
    if matrix.style == "row":
        return ceil(matrix.inputs / tp), matrix.outputs
    if matrix.style == "key_value":
        return matrix.inputs, matrix.outputs * kv_share(layer, tp)
    if matrix.style in ("column", "head", "width_norm"):
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
    if layout.chunks > 1 and name not in ("zbvzerobubble",):
        return min(pp * (1 + (pp - 1) / (pp * layout.chunks)), microbatches)
    return min(pp, microbatches)


def bubble(layout: Layout) -> float:
    """Idle time of a process in a step, in units of one micro-batch through one process.

    (pp - 1) / chunks for 1F1B and GPipe; zero-bubble schedules fill most of it with weight gradients: a third is left
    where the three parts of the work are equal (Qi et al. 2023, arXiv:2401.10241; 2024, arXiv:2405.15362).
    """
    idle = (layout.pp - 1) / layout.chunks
    if layout.schedule.lower() in ("interleavedzerobubble", "zbvzerobubble", "dualpipev"):
        return idle / 3
    return idle

"""What a training engine offers the loop, and the table of engines."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from parallel.across import Gather
from parallel.mesh import ParallelConfig
from parallel.plan import Plan
from parallel.remat import Recompute
from parallel.world import World

Precision = Literal["fp32", "bf16", "fp64"]
Batch = dict[str, Any]  # tensors, and records with a `to(device)` of their own
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class EngineSpec:
    """All that an engine needs to know of a run: plain values and functions, never the run's config.

    build: makes the model; called under the meta device. forward: (model, batch, x) -> hidden states, x in place of
    the batch's tokens where an earlier pipeline stage made it. loss: (model, hidden, batch) -> sums over the batch,
    called `sums`, of which "loss" is differentiated. sequence: entries of a batch whose dim 1 context parallelism cuts.
    make_optimizer: named parameters -> optimizer. clip_grad_norm: largest norm, 0 for none. recompute_every: of how
    many blocks one recomputes. compile: compile blocks; the loss compiles what it wants itself. seq_len: tokens of a
    sample. global_batch, micro_batch: samples of a step over all processes, and of what one forward takes. across: for
    a loss that compares a sample with those of all data ranks; called with what gathers them. frozen: parameters that
    stay as they are, by pattern. ema: decay of a moving average of the others, kept as optimizer state; 0: none.
    """

    build: Callable[[], nn.Module]
    plan: Plan
    forward: Callable[[nn.Module, Batch, Tensor | None], Tensor]
    loss: Callable[[nn.Module, Tensor, Batch], Sums]
    sums: tuple[str, ...]
    sequence: tuple[str, ...]
    make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
    parallel: ParallelConfig
    seq_len: int
    global_batch: int
    micro_batch: int
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    recompute_every: int = 1
    compile: bool = False
    clip_grad_norm: float = 0.0
    seed: int = 0
    across: Callable[[Gather], None] | None = None
    frozen: tuple[str, ...] = ()
    ema: float = 0.0


class Engine(Protocol):
    """Owns parameters, gradients and optimizer. Every method is collective: all ranks call it alike."""

    data_rank: int  # which part of the global batch this process reads, of data_world
    data_world: int

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        """Gradients of sum(loss) / count over the global batch; returns each sum / count, equal on all ranks."""

    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        """Sums over all micro-batches of all ranks, without gradients."""

    def gradients(self) -> dict[str, Tensor]:
        """Live gradients by the names of `state_dict()`; parameters without one are left out."""

    def clip_grad_norm(self) -> Tensor:
        """Scale gradients down to the largest norm allowed; returns the norm before, over all ranks."""

    def step(self, lr: float) -> None:
        """One optimizer update at learning rate `lr`; gradients are gone afterwards."""

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Elementwise sum of integers over data ranks, on the engine's device.

        Ranks that read the same data count once. Where they give different values, the sum is rounded up.
        """

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{"model": ..., "optimizer": ...}: flat names -> live tensors (DTensors where sharded), each storage once.

        Names are the native model's; optimizer state is "<key>.<parameter name>".
        """

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what was read into the tensors of `state_dict()`."""

    @property
    def ties(self) -> dict[str, str]:
        """Other parameter name -> the name in `state_dict()` that it shares storage with."""

    def close(self) -> None:
        """Release what the engine holds."""


ENGINES = {"torch": "parallel.engines.native:NativeEngine"}


def make_engine(name: str, spec: EngineSpec, world: World) -> Engine:
    """The engine called `name`. Raises ValueError for an unknown one."""
    if name not in ENGINES:
        raise ValueError(f"engine = {name!r} is unknown: one of {', '.join(ENGINES)}")
    module, _, cls = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), cls)(spec, world)
    return engine

"""What a training engine offers the loop, and the table of engines."""

import importlib
import importlib.metadata
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    options: what one engine alone knows by these names.
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
    options: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Support:
    """What one engine is and can do.

    where: module:class, imported when chosen. only: key of a recipe -> the values it can do; a key that is not named
    takes any. package: the distribution that it needs, of versions from `tested[0]` on and below `tested[1]`. extra:
    what pip installs it by. newer: what is newer may be tried where there are GPUs.
    """

    where: str
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    package: str = ""
    tested: tuple[str, str] = ("", "")
    extra: str = ""
    newer: bool = False

    def obstacles(self, asked: Mapping[str, Any]) -> list[str]:
        """Keys of which it cannot do what is asked."""
        return [key for key, values in self.only.items() if key in asked and asked[key] not in values]


ENGINES = {
    "torch": Support("parallel.engines.native:NativeEngine"),
    "megatron": Support(
        "parallel.engines.megatron:MegatronEngine",
        only={
            "model.family": ("decoder",),
            "objective.name": ("causal",),
            "optim.name": ("adamw",),
            "optim.freeze": ((),),
            "optim.lr_ratios": ({},),
            "optim.ema": (0.0,),
            "train.compile": ("auto", "off"),
            "parallel.schedule": ("1f1b", "interleaved1f1b"),
            "parallel.stage_layers": ((),),
            "parallel.cpu_offload": (False,),
        },
        package="megatron-core",
        tested=("0.16.1", "0.17"),
        extra="megatron",
        newer=True,  # its shim for hosts is what counts on one version
    ),
    "deepspeed": Support(
        "parallel.engines.deepspeed:DeepSpeedEngine",
        only={
            "optim.name": ("adamw",),
            "optim.ema": (0.0,),
            "train.precision": ("fp32", "bf16"),
            "parallel.pp": (1,),
            "parallel.cp": (1,),
            "parallel.tp": (1,),  # ZeRO strings parameters together, which DTensors cannot be
            "parallel.ep": (1,),
            "parallel.cpu_offload": (False,),
        },
        package="deepspeed",
        tested=("0.19.8", "0.20"),
        extra="deepspeed",
    ),
}


def check_engine(name: str, asked: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown engine, and for one that cannot do all that is `asked`, key of a recipe ->
    value: what it cannot, what it can, and which engines can all of it.
    """
    if name not in ENGINES:
        raise ValueError(f"engine = {name!r} is unknown: one of {', '.join(ENGINES)}")
    obstacles = ENGINES[name].obstacles(asked)
    if not obstacles:
        return
    wrong = ", ".join(f"{key} = {_shown(asked[key])}" for key in obstacles)
    cures = "; ".join(f"set {key} to {' or '.join(map(_shown, ENGINES[name].only[key]))}" for key in obstacles)
    able = [f'engine = "{other}"' for other, support in ENGINES.items() if not support.obstacles(asked)]
    others = f", or take {' or '.join(able)}, which can" if able else "; no engine can all that the recipe asks"
    raise ValueError(f'engine = "{name}" cannot do {wrong}: {cures}{others}')


def check_installed(name: str) -> None:
    """Raises ValueError where the package of an engine is missing, or not of a version that it was tested with."""
    support = ENGINES[name]
    if not support.package:
        return
    install = f"pip install 'pretrain-stack[{support.extra}]'"
    try:
        version = importlib.metadata.version(support.package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f'engine = "{name}" needs the package {support.package}, which is not installed: {install}, or take '
            'engine = "torch"'
        ) from None
    low, high = support.tested
    if support.newer and _numbers(version) >= _numbers(high) and torch.cuda.is_available():
        warnings.warn(f"{support.package} {version} is newer than those tested, {low} to below {high}", stacklevel=2)
    elif not _numbers(low) <= _numbers(version) < _numbers(high):
        raise ValueError(
            f'engine = "{name}": {support.package} {version} is installed, tested are {low} and later below {high}: '
            f'{install}, or take engine = "torch"'
        )


def make_engine(name: str, spec: EngineSpec, world: World) -> Engine:
    """The engine called `name`. Raises ValueError for one that is unknown or not installed."""
    check_engine(name, {})
    check_installed(name)
    where, _, cls = ENGINES[name].where.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that an engine's would like too
        module = importlib.import_module(where)
    engine: Engine = getattr(module, cls)(spec, world)
    return engine


def _shown(value: Any) -> str:
    """As a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version, up to the first part that is none: 0.16.1rc0 is (0, 16)."""
    parts = itertools.takewhile(str.isdigit, version.split("+")[0].split("."))
    return tuple(map(int, parts))

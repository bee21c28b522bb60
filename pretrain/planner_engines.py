"""What the recipe's engine does and leaves no choice of, for `pretrain.planner`."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

from parallel.engine import ENGINES
from parallel.engines.megatron_checks import check_layout
from parallel.mesh import AXES
from parallel.planner.layout import Layout, Part, Program, parts_of
from parallel.planner.programs import deepspeed_program, megatron_program, torch_program
from parallel.planner.shape import ModelShape
from pretrain.config import RunConfig
from pretrain.engine import make_spec
from pretrain.objectives import OBJECTIVES

OFFLOADED = ("optimizer", "parameters")


def check_places(config: RunConfig) -> None:
    """Raises ValueError where something is not to lie on the GPU, and for blocks that ZeRO 3 would have compiled."""
    asked: dict[str, Any] = {"parallel.cpu_offload": config.parallel.cpu_offload}
    if config.engine == "deepspeed":
        asked |= {f"deepspeed.offload_{what}": getattr(config.deepspeed, f"offload_{what}") for what in OFFLOADED}
        if config.deepspeed.zero == 3 and config.train.compile == "on":
            raise ValueError(
                'deepspeed.zero = 3 cannot compile blocks; set train.compile = "off" or "auto", or deepspeed.zero = 2'
            )
    for key, value in asked.items():
        if value not in (False, "none"):
            shown, cure = ("true", "false") if value is True else (f'"{value}"', '"none"')
            raise ValueError(f"{key} = {shown} cannot be planned: all is counted on the GPU; set it to {cure}")


def make_program(config: RunConfig) -> Program:
    """How a run of this config stores and computes on its engine."""
    bf16, compiled = config.train.precision == "bf16", config.train.compile != "off"
    chunk = getattr(config.objective, "chunk_tokens", 0)
    if config.engine == "megatron":
        return megatron_program(bf16=bf16, chunk=chunk)
    if config.engine == "deepspeed":
        zero, small = config.deepspeed.zero, config.deepspeed.persistent
        parameters = config.model.num_parameters()
        compiled = compiled and zero < 3
        return deepspeed_program(
            bf16=bf16, compiled=compiled, chunk=chunk, zero=zero, persistent=small, parameters=parameters
        )
    return torch_program(bf16=bf16, compiled=compiled, chunk=chunk, muon=config.optim.name == "muon")


def pin(config: RunConfig, pinned: dict[str, Any], gpus: int) -> dict[str, Any]:
    """With what the engine leaves no choice."""
    names = {field.name for field in fields(Layout)}
    for key, values in ENGINES[config.engine].only.items():
        section, _, name = key.partition(".")
        if section == "parallel" and name in names and len(values) == 1:
            pinned[name] = values[0]
    if config.engine == "deepspeed":  # both axes are one: what they share is for ZeRO to say
        if pinned.get("dp_replicate", 0) * pinned.get("dp_shard", 0) in (0, gpus):
            pinned.pop("dp_shard", None)
        pinned["dp_replicate"] = 1
    if config.engine == "megatron" and "dp_shard" not in pinned:
        pinned.setdefault("dp_replicate", 1)
    return pinned


def megatron_check(config: RunConfig) -> Callable[[Layout], None]:
    """What raises ValueError for a layout that Megatron-Core cannot have."""
    spec = make_spec(config, OBJECTIVES[config.objective.name][1](config.objective))

    def check(layout: Layout) -> None:
        names = (*AXES, "ep", "cp_method", "schedule", "expert_tp")
        update = {name: getattr(layout, name) for name in names}
        update["stages_per_rank"] = layout.chunks if layout.chunks > 1 else 0
        own = replace(spec, parallel=config.parallel.model_copy(update=update), micro_batch=layout.micro_batch)
        check_layout(own, spec.options["facts"], {axis: getattr(layout, axis) for axis in (*AXES, "ep")})

    return check


def megatron_cuts(config: RunConfig, shape: ModelShape) -> Callable[[Layout], tuple[Part, ...]]:
    """As `pretrain.planner.stage_cuts`: Megatron's stages have equally many layers."""
    check = megatron_check(config)
    numbers = range(len(shape.layers))

    @cache
    def parts(pp: int, schedule: str, stages: int) -> tuple[Part, ...]:
        each = len(numbers) // stages
        return parts_of(shape, [numbers[n * each : (n + 1) * each] for n in range(stages)], pp, schedule)

    def cut(layout: Layout) -> tuple[Part, ...]:
        try:
            check(layout)
        except ValueError:
            return ()
        return parts(layout.pp, layout.schedule, layout.pp * layout.chunks)

    return cut

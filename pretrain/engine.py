"""The recipe's engine around the recipe's model."""

from typing import Any

from parallel.engine import Engine, EngineSpec, make_engine
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.models import FAMILIES
from pretrain.optim import build_optimizer


def make_spec(config: RunConfig, objective: Any, compiling: bool = False) -> EngineSpec:
    """All that an engine needs to know of the recipe. objective: its own. compiling: blocks are to be compiled."""
    family = FAMILIES[config.model.family]
    options: dict[str, Any] = {}
    if config.engine == "megatron" and family.megatron is not None:
        options = {"facts": family.megatron(config.model)}
    if config.engine == "deepspeed":
        options = config.deepspeed.model_dump()
    return EngineSpec(
        build=lambda: family.build(config.model),
        plan=family.plan(config.model),
        forward=objective.forward,
        loss=objective.loss,
        sums=objective.sums,
        sequence=objective.sequence,
        make_optimizer=lambda named: build_optimizer(named, config.optim),
        parallel=config.parallel,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        recompute=config.train.recompute,
        recompute_every=config.train.recompute_every,
        compile=compiling,
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.run.seed,
        frozen=config.optim.freeze,
        ema=config.optim.ema,
        across=getattr(objective, "across", None),
        options=options,
    )


def build_engine(config: RunConfig, world: World, objective: Any, compiling: bool = False) -> Engine:
    """Collective. Raises ValueError for what the engine cannot do."""
    try:
        return make_engine(config.engine, make_spec(config, objective, compiling), world)
    except ValueError as error:
        error.on_all_ranks = True  # type: ignore[attr-defined]  # every rank checks the same layout
        raise

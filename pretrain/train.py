"""The training run: build -> loop -> step."""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.collective import Ranks
from checkpoints.manifest import Manifest
from checkpoints.state import rng_state, set_rng_state
from checkpoints.store import CheckpointStore
from data_pipeline.loader import Loader
from parallel.engine import Batch, Engine, EngineSpec, make_engine
from parallel.hardware import device_peak_flops
from parallel.mesh import axes_across_nodes, resolve_degrees
from parallel.world import World
from pretrain.agree import check_agreement
from pretrain.compile import decide_compile
from pretrain.config import RunConfig, flat_config, load_run_config, write_config
from pretrain.data import (
    check_tokenizer,
    describe_packing,
    keep_tokenizer,
    open_datasets,
    open_held_out,
    open_stream,
    with_tokenizer,
    with_vocabulary,
)
from pretrain.environment import describe_environment
from pretrain.evaluate import held_out_loss
from pretrain.lock import RunLock
from pretrain.metrics import HostCopy, Metrics
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.optim import build_optimizer
from pretrain.router_health import RouterHealth
from pretrain.schedule import learning_rate


@dataclass
class Position:
    """How far the run has got: what a resume needs beside the engine's state."""

    step: int = 0  # optimizer steps taken
    cursor: int = 0  # global index of the next sample


def train(config: RunConfig, world: World, resume_command: str = "the same command") -> Position:
    """Train to `train.steps`, or to a signal; every rank calls it. Returns where the run stands, checkpoint saved.

    A run found in `run.dir` is continued from its newest whole checkpoint. `resume_command` is what a stopped run
    tells the user to type. Raises ValueError or FileNotFoundError for what the user can mend.
    """
    ranks = Ranks()
    check_agreement(config, ranks)
    run_dir = Path(config.run.dir)
    lock = RunLock(run_dir)
    ranks.on_first(lock.take)
    try:
        return _train(config, world, ranks, resume_command)
    finally:
        lock.release()


def _train(config: RunConfig, world: World, ranks: Ranks, resume_command: str) -> Position:
    run_dir = Path(config.run.dir)
    store = CheckpointStore(
        run_dir / "checkpoints", keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every or None
    )
    found = ranks.on_first(lambda: check_resume(config, store))
    config = with_tokenizer(config)
    datasets = open_datasets(config, ranks.on_first)
    for dataset in datasets:
        config = with_vocabulary(config, dataset)
    held_out = open_held_out(config) if config.eval.every else None
    if found is not None and found >= (config.train.stop_at or config.train.steps):
        key = "train.stop_at" if config.train.stop_at else "train.steps"
        _say(world, f"{run_dir} is at step {found} of {config.train.steps}: nothing to do; raise {key} to go on")
        return Position(found)

    changes = ranks.on_first(lambda: check_changes(config, datasets, found))
    objective = OBJECTIVES[config.objective.name][1](config.objective)
    # Of the whole run, not of what is left of it: a resume must compute what the uninterrupted run would.
    flops = _flops_a_step(config) * config.train.steps / world.size
    compiling, why = decide_compile(config.train.compile, flops, world.device)
    _say(world, f"model: {config.model.num_parameters():,} parameters")
    degrees = resolve_degrees(config.parallel, world.size)
    for axis in axes_across_nodes(degrees, world.per_node):
        _say(
            world,
            f"warning: parallel.{axis} = {degrees[axis]} reaches over nodes of {world.per_node} processes, and it "
            "communicates in every layer; make it fit into one",
        )
    _say(world, f"compile: {'on' if compiling else 'off'} ({why})")
    if compiling:
        objective.compile()
    engine = build_engine(config, world, objective, compiling)
    afresh = any(change.startswith("optim.freeze ") for change in changes)
    position = Position() if found is None else resume(store, found, engine, world, afresh)
    if found is not None:
        _say(world, f"resuming {run_dir} at step {position.step}")
        for change in changes:
            _say(world, f"changed since the last start: {change}")
        if afresh:
            _say(world, "other parameters are trained now: the optimizer's state starts anew")
    loader = Loader(
        open_stream(config, datasets),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=engine.data_rank,
        world=engine.data_world,
        cursor=position.cursor,
        prefetch=config.data.prefetch,
    )
    for line in describe_packing(config, datasets, engine.data_world) if world.rank == 0 else ():
        print(line, flush=True)
    ranks.on_first(lambda: record_run(config, datasets, world, position.step, changes))
    metrics = start_metrics(config, world, position) if world.rank == 0 else None
    try:
        loop(config, engine, objective, loader, store, metrics, held_out, position, resume_command)
    finally:
        loader.close()
        if metrics is not None:
            metrics.close()
        engine.close()
    return position


def loop(
    config: RunConfig,
    engine: Engine,
    objective: Any,
    loader: Loader,
    store: CheckpointStore,
    metrics: Metrics | None,
    held_out: Any,
    position: Position,
    resume_command: str,
) -> None:
    """Steps until the end or a signal; evaluates and saves when due. `position` is moved along."""
    total = config.train.steps
    last = min(config.train.stop_at or total, total)
    first = position.step
    stopping = False
    with stop_requests() as requested:
        previous = HostCopy({})
        while position.step < last and not stopping:
            microbatches, cursor = next(loader)
            batches = [objective.collate(batch) for batch in microbatches]
            if position.step == first and metrics is not None:
                metrics.print(f"attention: {describe_attention(config, objective, batches[0], metrics.device)}")
            lr = learning_rate(config.schedule, position.step, total, config.optim.lr)
            values, stop = train_step(engine, objective, batches, lr, bool(requested))
            # The step before is looked at now, while the device works on this one: nobody waits.
            stopping = check_step(previous, position.step, store)
            position.step, position.cursor = position.step + 1, cursor
            previous = HostCopy({**values, "stop": stop})
            if metrics is not None:
                metrics.log(position.step, values)
            due = [every and position.step % every == 0 for every in (config.eval.every, config.checkpoint.every)]
            if held_out is not None and (due[0] or position.step == last):
                evaluate(engine, objective, held_out, config, metrics, position.step)
            if due[1] or position.step == last or stopping:
                check_step(previous, position.step, store)
                save(store, engine, position, metrics)
    if position.step < total and metrics is not None:
        why = f"by a signal; resume with: {resume_command}" if stopping else "as train.stop_at says; resume without it"
        metrics.print(f"stopped at step {position.step} of {total} {why}")


def train_step(
    engine: Engine, objective: Any, microbatches: list[Batch], lr: float, stop: bool
) -> tuple[dict[str, Tensor | float], Tensor]:
    """One optimizer step; returns numbers for the log, and whether any rank was asked to stop.

    The loss is a sum over targets divided by their global count, and gradients are summed: every layout, micro-batch
    size and accumulation agrees.
    """
    count, stopping = engine.sum_over_data(torch.tensor([objective.count(microbatches), int(stop)])).unbind()
    sums = engine.forward_backward(microbatches, count)
    norm = engine.clip_grad_norm()
    engine.step(lr)
    return {**sums, "lr": lr, "grad_norm": norm}, stopping


def check_step(values: HostCopy, step: int, store: CheckpointStore) -> bool:
    """Whether any rank had been asked to stop at `step`. Raises ValueError where its loss or gradient is not finite:
    nothing good can follow, and no checkpoint of it may push out a good one.
    """
    numbers = values.read()
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers.get(name, 0.0))]
    if broken:
        error = ValueError(
            f"{broken[0]} is {numbers[broken[0]]} at step {step}: nothing was saved since step "
            f"{store.newest_whole() or 0} in {store.folder}; resume there with a lower optim.lr, or look at the data"
        )
        error.on_all_ranks = True  # type: ignore[attr-defined]  # the numbers are sums over all ranks
        raise error
    return bool(numbers.get("stop"))


def build_engine(config: RunConfig, world: World, objective: Any, compiling: bool = False) -> Engine:
    """The engine of the recipe around the recipe's model."""
    family = FAMILIES[config.model.family]
    spec = EngineSpec(
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
        across=getattr(objective, "across", None),
    )
    try:
        return make_engine(config.engine, spec, world)
    except ValueError as error:
        error.on_all_ranks = True  # type: ignore[attr-defined]  # every rank checks the same layout
        raise


def describe_attention(config: RunConfig, objective: Any, batch: Any, device: torch.device) -> str:
    """The back end that attention takes, for the log."""
    if config.parallel.cp != 1 and config.parallel.cp_method == "ring":
        return 'ring over the context-parallel processes (parallel.cp_method = "ring")'
    return str(objective.describe(batch, config.model, config.train.precision, device))


def check_resume(config: RunConfig, store: CheckpointStore) -> int | None:
    """Step of the checkpoint to continue from, or None for a new run, as `run.resume` allows."""
    found = store.newest_whole()
    if found is None and (broken := store.list()):
        raise ValueError(
            f"{store.folder} has {len(broken)} checkpoints and none is whole ({broken[-1].problem}); restore one, or "
            "choose another run.dir to start anew"
        )
    if found is None and config.run.resume == "must":
        raise FileNotFoundError(f'run.resume = "must", but {store.folder} has no whole checkpoint; check run.dir')
    if found is not None and config.run.resume == "never":
        raise ValueError(
            f'run.resume = "never", but {config.run.dir} holds a run at step {found}; choose another run.dir'
        )
    if found is not None and found > config.train.steps:
        raise ValueError(
            f"train.steps = {config.train.steps}, but {config.run.dir} is at step {found} already; raise train.steps "
            "or choose another run.dir"
        )
    return found


def resume(store: CheckpointStore, step: int, engine: Engine, world: World, afresh: bool = False) -> Position:
    """Fill the engine from a checkpoint. One without optimizer state (an import), or `afresh` (other parameters are
    trained now), starts a fresh optimizer.
    """
    state = engine.state_dict()
    path = store.folder / f"step-{step:08d}"
    optimizer = state["optimizer"] if Manifest.read(path).tensors["optimizer"] and not afresh else None
    extra = store.load(step, state["model"], optimizer)
    engine.load_state_dict(state)
    if len(extra["ranks"]) == world.size and extra["ranks"][world.rank]:
        set_rng_state(extra["ranks"][world.rank]["rng"])
    return Position(extra["step"], extra.get("cursor", 0))


def save(store: CheckpointStore, engine: Engine, position: Position, metrics: Metrics | None) -> None:
    """Write a checkpoint; a failure ends the run, with the earlier ones untouched."""
    state = engine.state_dict()
    extra = {"cursor": position.cursor}

    def write() -> Path:
        return store.save(
            position.step, state["model"], state["optimizer"], extra, ties=engine.ties, rank_state={"rng": rng_state()}
        )

    if metrics is None:
        write()
        return
    with metrics.paused():
        path = write()
    metrics.print(f"saved {path}")


def evaluate(
    engine: Engine, objective: Any, held_out: Any, config: RunConfig, metrics: Metrics | None, step: int
) -> None:
    if metrics is None:
        held_out_loss(engine, objective, held_out, config)
        return
    with metrics.paused():
        values = held_out_loss(engine, objective, held_out, config)
    metrics.log_eval(step, values)


def check_changes(config: RunConfig, datasets: Any, found: int | None) -> list[str]:
    """Settings that differ from the last start of the run, one line each. Raises ValueError for those that would give
    the saved position another meaning, and for another tokenizer.
    """
    run_dir = Path(config.run.dir)
    check_tokenizer(config, datasets, run_dir)
    if not found or not (run_dir / "config.toml").is_file():
        return []
    before, after = flat_config(load_run_config(run_dir)), flat_config(config)
    for key in ("run.seed", "data.seq_len"):
        if before[key] != after[key]:
            raise ValueError(
                f"{key} = {after[key]}, but {run_dir} was started with {before[key]}, and its place in the data counts "
                f"on that; set it back, or choose another run.dir"
            )
    keys = dict.fromkeys([*before, *after])
    return [f"{k} {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def record_run(config: RunConfig, datasets: Any, world: World, step: int, changes: list[str]) -> None:
    """What this run is, beside its results: resolved config, environment, tokenizer; and a line for this start."""
    run_dir = Path(config.run.dir)
    write_config(config, run_dir / "config.toml")
    environment = describe_environment(config.run.seed, world.size, world.device)
    (run_dir / "env.json").write_text(json.dumps(environment, indent=2) + "\n")
    with (run_dir / "starts.jsonl").open("a") as starts:
        starts.write(json.dumps({"step": step, "changes": changes, **environment}) + "\n")
    keep_tokenizer(config, datasets, run_dir)


def start_metrics(config: RunConfig, world: World, position: Position) -> Metrics:
    peak = device_peak_flops(world.device)
    metrics = Metrics(
        Path(config.run.dir),
        tokens_per_step=config.train.global_batch * config.data.seq_len,
        flops_per_step=_flops_a_step(config),
        peak_flops=peak * world.size if peak else None,
        device=world.device,
        every=config.log.every,
        tensorboard=config.log.tensorboard,
        routers=router_health(config),
    )
    metrics.start(position.step, config.train.steps)
    return metrics


def router_health(config: RunConfig) -> RouterHealth | None:
    """None for a model without experts."""
    if config.model.moe is None:
        return None
    layers = [layer for layer in range(config.model.layers) if config.model.sparse(layer)]
    return RouterHealth(config.model.moe, layers, config.train.global_batch * config.data.seq_len, config.data.seq_len)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put their number into: the loop finishes its step, saves and leaves."""
    requested: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda received, _frame: requested.append(received)) for number in signals
    }
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _flops_a_step(config: RunConfig) -> float:
    a_token = config.model.flops_per_token + config.model.attention_flops_per_token(config.data.seq_len)
    return a_token * config.train.global_batch * config.data.seq_len


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)

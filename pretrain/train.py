"""The training run: build -> loop -> step."""

import json
import math
import platform
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.collective import Ranks
from checkpoints.store import CheckpointStore
from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader
from data_pipeline.mix import MixedStream
from parallel.engine import Batch, Engine
from parallel.hardware import device_peak_flops
from parallel.mesh import axes_across_nodes, resolve_degrees
from parallel.world import World
from pretrain.agree import check_agreement
from pretrain.compile import decide_compile
from pretrain.config import RunConfig, write_config
from pretrain.data import (
    Dataset,
    describe_packing,
    keep_tokenizer,
    open_datasets,
    open_held_out,
    with_tokenizer,
    with_vocabulary,
)
from pretrain.engine import build_engine
from pretrain.environment import describe_environment
from pretrain.evaluate import held_out_loss
from pretrain.heartbeat import Heartbeat
from pretrain.history import append_start, recording_end
from pretrain.lock import RunLock
from pretrain.metrics import HostCopy, Metrics
from pretrain.mixture import open_stream, source_names
from pretrain.objectives import OBJECTIVES
from pretrain.resume import FROZEN, Position, check_changes, check_resume, meaning, resume
from pretrain.router_health import RouterHealth
from pretrain.saving import Saver
from pretrain.schedule import learning_rate
from pretrain.spikes import SPIKES, Spikes, document_losses, write_spike

LEDGER = "ledger.bin"
NOTHING: Mapping[str, bool] = {}


@dataclass(frozen=True)
class Run:
    """What the loop works with. metrics, ledger: on rank 0 alone."""

    config: RunConfig
    engine: Engine
    objective: Any
    datasets: list[Dataset]
    held_out: Dataset | None
    stream: MixedStream
    loader: Loader
    saver: Saver
    metrics: Metrics | None
    ledger: Ledger | None
    beat: Heartbeat


def train(
    config: RunConfig,
    world: World,
    resume_command: str = "the same command",
    watch: Callable[[Heartbeat], AbstractContextManager[Any]] = nullcontext,
) -> Position:
    """Train to `train.steps`, or to a signal; every rank calls it. Returns where the run stands, checkpoint saved.

    A run found in `run.dir` is continued from its newest whole checkpoint. `resume_command` is what a stopped run
    tells the user to type; `watch` may look after the run, by its heartbeat. Raises ValueError or FileNotFoundError for
    what the user can mend.
    """
    ranks = Ranks()
    check_agreement(config, ranks)
    run_dir = Path(config.run.dir)
    lock = RunLock(run_dir)
    ranks.on_first(lock.take)
    try:
        with Heartbeat(run_dir, world.rank, config.log.every) as beat, watch(beat):
            return _train(config, world, ranks, beat, resume_command)
    finally:
        lock.release()


def _train(config: RunConfig, world: World, ranks: Ranks, beat: Heartbeat, resume_command: str) -> Position:
    run_dir = Path(config.run.dir)
    store = open_store(config)
    if (fetched := ranks.on_first(store.fetch)) is not None:
        _say(world, f"fetched the checkpoint of step {fetched} from {config.checkpoint.remote}")
    found = store.newest_sound()
    ranks.on_first(lambda: check_resume(config, store, found))
    config = with_tokenizer(config)
    datasets = open_datasets(config, ranks.on_first)
    for dataset in datasets:
        config = with_vocabulary(config, dataset)
    held_out = open_held_out(config) if config.eval.every else None
    if found is not None and found >= (config.train.stop_at or config.train.steps):
        key = "train.stop_at" if config.train.stop_at else "train.steps"
        _say(world, f"{run_dir} is at step {found} of {config.train.steps}: nothing to do; raise {key} to go on")
        return Position(found)

    changes = ranks.on_first(lambda: check_changes(config, store, datasets, found))
    objective, engine = start_engine(config, world)
    afresh = any(change.startswith(f"{FROZEN} ") for change in changes)
    beat.enter("loading")
    position = Position() if found is None else resume(store, found, engine, world, afresh)
    beat.step = position.step
    if found is not None:
        _say(world, f"resuming {run_dir} at step {position.step}")
        for change in changes:
            _say(world, f"changed since the last start: {change}")
        if afresh:
            _say(world, "other parameters are trained now: the optimizer's state starts anew")
    stream = open_stream(config, datasets, position.mixture, position.cursor, position.step)
    for line in describe_packing(config, datasets, engine.data_world) if world.rank == 0 else ():
        print(line, flush=True)
    hosts = list(dict.fromkeys(ranks.gather(platform.node())))
    ranks.on_first(lambda: record_run(config, datasets, world, position.step, changes, hosts))
    with ExitStack() as opened:
        end = opened.enter_context(recording_end(run_dir, world.rank, lambda: position.step))
        opened.callback(engine.close)
        loader = opened.enter_context(make_loader(config, engine, stream, position.cursor))
        metrics = ledger = None
        if world.rank == 0:
            metrics = start_metrics(config, world, position)
            opened.callback(metrics.close)
            names, batch = stream.timeline.names, config.train.global_batch
            ledger = opened.enter_context(Ledger(run_dir / LEDGER, position.step, names, stream.documents, batch))
        opened.callback(store.close)
        saver = Saver(store, engine, config.checkpoint, metrics)
        run = Run(config, engine, objective, datasets, held_out, stream, loader, saver, metrics, ledger, beat)
        end[:] = loop(run, position, resume_command)
    return position


def start_engine(config: RunConfig, world: World) -> tuple[Any, Engine]:
    """The objective, and the engine with initial weights; rank 0 says what was chosen."""
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
    return objective, build_engine(config, world, objective, compiling)


def open_store(config: RunConfig) -> CheckpointStore:
    """The checkpoints of the run, of which the recipe says which ones stay."""
    chosen = config.checkpoint
    return CheckpointStore(
        Path(config.run.dir) / "checkpoints",
        keep=chosen.keep,
        keep_every=chosen.keep_every or None,
        best=chosen.best or None,
        best_mode=chosen.best_mode,
        keep_best=chosen.keep_best,
        remote=chosen.remote or None,
    )


def make_loader(config: RunConfig, engine: Engine, stream: MixedStream, cursor: int) -> Loader:
    """This process's part of the steps from sample `cursor` on."""
    return Loader(
        stream,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=engine.data_rank,
        world=engine.data_world,
        cursor=cursor,
        prefetch=config.data.prefetch,
    )


def loop(run: Run, position: Position, resume_command: str) -> tuple[str, str | None]:
    """Steps until the end or a signal; evaluates and saves when due. `position` is moved along. Returns why it ended:
    the reason and the detail of `append_end`.
    """
    config, metrics = run.config, run.metrics
    total = config.train.steps
    last = min(config.train.stop_at or total, total)
    first, batch_size = position.step, config.train.global_batch
    position.mixture = run.stream.timeline.state()
    spikes = Spikes(config.log.spike)
    stopping = False
    run.beat.enter("first step")
    with stop_requests() as requested:
        previous = HostCopy({})
        while position.step < last and not stopping:
            with run.beat.phase("waiting for data"):
                microbatches, cursor = next(run.loader)
            batches = [run.objective.collate(batch) for batch in microbatches]
            if position.step == first and metrics is not None:
                metrics.print(f"attention: {describe_attention(config, run.objective, batches[0], metrics.device)}")
            lr = learning_rate(config.schedule, position.step, total, config.optim.lr)
            asked = {"stop": bool(requested), "save": run.saver.late()}
            values, wanted = train_step(run.engine, run.objective, batches, lr, asked)
            if run.ledger is not None:
                run.ledger.add(position.step + 1, position.cursor)
            # The step before is looked at now, while the device works on this one: nobody waits.
            numbers = check_step(previous, position.step, run.saver.store)
            stopping = bool(numbers.get("stop"))
            if score := spikes.score(numbers.get("loss")):
                report_spike(run, position.step, position.cursor - batch_size, numbers["loss"], score)
            position.step, position.cursor = position.step + 1, cursor
            run.beat.done(position.step)
            previous = HostCopy({**values, **wanted})
            run.saver.report()
            if metrics is not None:
                metrics.log(position.step, values)
            due = [every and position.step % every == 0 for every in (config.eval.every, config.checkpoint.every)]
            if run.held_out is not None and (due[0] or position.step == last):
                evaluate(run, position.step)
            if due[1] or position.step == last or stopping or numbers.get("save"):
                check_step(previous, position.step, run.saver.store)
                save(run, position, last=position.step == last or stopping)
        with run.beat.phase("saving"):
            run.saver.finish()
    if position.step < total and metrics is not None:
        why = f"by a signal; resume with: {resume_command}" if stopping else "as train.stop_at says; resume without it"
        metrics.print(f"stopped at step {position.step} of {total} {why}")
    if position.step >= total or not stopping:
        return ("finished" if position.step >= total else "stop_at"), None
    return "signal", signal.Signals(requested[0]).name if requested else "another rank was asked to stop"


def report_spike(run: Run, step: int, first: int, loss: float, score: float) -> None:
    """Name the documents of a step whose loss stands out, with their losses as the model sees them now. Collective."""
    with run.beat.phase("evaluating"), nullcontext() if run.metrics is None else run.metrics.paused():
        found = document_losses(run.engine, run.objective, run.stream, run.config, first)
    if run.metrics is not None:
        datasets = dict(zip(source_names(run.config), run.datasets, strict=True))
        write_spike(Path(run.config.run.dir), step, loss, score, found, run.stream.timeline.names, datasets)
        run.metrics.print(f"loss {loss:.4f} of step {step} stands out ({score:.0f} deviations): see {SPIKES}")


def train_step(
    engine: Engine, objective: Any, microbatches: list[Batch], lr: float, asked: Mapping[str, bool] = NOTHING
) -> tuple[dict[str, Tensor | float], dict[str, Tensor]]:
    """One optimizer step; returns numbers for the log, and which of `asked` any rank was asked for.

    The loss is a sum over targets divided by their global count, and gradients are summed: every layout, micro-batch
    size and accumulation agrees.
    """
    own = torch.tensor([objective.count(microbatches), *map(int, asked.values())])
    count, *wanted = engine.sum_over_data(own).unbind()
    sums = engine.forward_backward(microbatches, count)
    norm = engine.clip_grad_norm()
    engine.step(lr)
    return {**sums, "lr": lr, "grad_norm": norm}, dict(zip(asked, wanted, strict=True))


def check_step(values: HostCopy, step: int, store: CheckpointStore) -> dict[str, float]:
    """The numbers of `step`, alike on all ranks; "stop": any was asked to. Raises ValueError where its loss or gradient
    is not finite: nothing good can follow, and no checkpoint of it may push out a good one.
    """
    numbers = values.read()
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers.get(name, 0.0))]
    if broken:
        store.close()  # a save in the background may be about to end
        error = ValueError(
            f"{broken[0]} is {numbers[broken[0]]} at step {step}: nothing was saved since step "
            f"{store.newest_whole() or 0} in {store.folder}; resume there with a lower optim.lr, or look at the data"
        )
        error.on_all_ranks = True  # type: ignore[attr-defined]  # the numbers are sums over all ranks
        raise error
    return numbers


def describe_attention(config: RunConfig, objective: Any, batch: Any, device: torch.device) -> str:
    """The back end that attention takes, for the log."""
    if config.parallel.cp != 1 and config.parallel.cp_method == "ring":
        return 'ring over the context-parallel processes (parallel.cp_method = "ring")'
    return str(objective.describe(batch, config.model, config.train.precision, device))


def save(run: Run, position: Position, *, last: bool) -> None:
    """Write a checkpoint, or begin to: `Saver` says how it ended."""
    if run.ledger is not None:
        run.ledger.sync()
    with run.beat.phase("saving"):
        state = {"cursor": position.cursor, "mixture": position.mixture, "recipe": meaning(run.config)}
        run.saver.save(position.step, state, last=last)


def evaluate(run: Run, step: int) -> None:
    assert run.held_out is not None
    with run.beat.phase("evaluating"), nullcontext() if run.metrics is None else run.metrics.paused():
        values = held_out_loss(run.engine, run.objective, run.held_out, run.config, run.beat.each)
    run.saver.measured(step, HostCopy(values).read())
    if run.metrics is not None:
        run.metrics.log_eval(step, values)


def record_run(config: RunConfig, datasets: Any, world: World, step: int, changes: list[str], hosts: list[str]) -> None:
    """What this run is, beside its results: resolved config, environment, tokenizer; and a line for this start."""
    run_dir = Path(config.run.dir)
    write_config(config, run_dir / "config.toml")
    environment = describe_environment(config.run.seed, world.size, world.device)
    (run_dir / "env.json").write_text(json.dumps(environment, indent=2) + "\n")
    append_start(run_dir, step=step, changes=changes, hosts=hosts, **environment)
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

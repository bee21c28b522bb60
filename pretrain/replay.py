"""A step of a run once more: the losses of its documents, under the weights that it was taken with."""

import json
import math
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.collective import Ranks
from checkpoints.store import CheckpointStore
from data_pipeline.ledger import Entry, read_ledger
from data_pipeline.mix import MixedStream
from parallel.engine import Engine
from parallel.mesh import resolve_degrees
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.data import Dataset, open_datasets
from pretrain.mixture import newest_mixture, open_stream, source_names
from pretrain.objectives import OBJECTIVES
from pretrain.resume import resume
from pretrain.schedule import learning_rate
from pretrain.spikes import document_losses, rows_of
from pretrain.train import LEDGER, make_loader, start_engine, train_step

QUIET = 10.0  # seconds between lines that say how far it is
Taken = tuple[int, int, int]  # step, its first sample, number of samples


class Replayed(NamedTuple):
    """rows: as `spikes.rows_of` gives them. loss: of the step now, nats a target. logged: what metrics.jsonl has."""

    rows: list[dict[str, Any]]
    loss: float | None
    logged: float | None
    start: int  # step of the checkpoint that was trained on from, 0: initial weights


def replay(config: RunConfig, world: World, step: int) -> Replayed:
    """Losses of the documents of `step`. Collective. Nothing is written.

    The newest whole checkpoint from before the step is trained on in memory up to it, on the samples that the ledger
    has, else with the config as it is: so the loss is the one that was logged, where nothing was edited in between.

    Raises ValueError for a step that the ledger does not have, and where its samples are other ones by now.
    """
    run_dir, ranks = Path(config.run.dir), Ranks()
    store = CheckpointStore(run_dir / "checkpoints")
    whole = ranks.on_first(lambda: [info.step for info in store.list() if info.problem is None])
    start = max((found for found in whole if found < step), default=None)
    datasets: list[Dataset] = open_datasets(config, ranks.on_first)
    stream = open_stream(config, datasets, *ranks.on_first(lambda: newest_mixture(store)))
    taken = ranks.on_first(lambda: list(steps_taken(run_dir / LEDGER, stream, start or 0, step)))
    *_, (_, first, batch) = taken
    config = with_batch(config, world, batch)
    if world.rank == 0:
        origin = "the initial weights" if start is None else f"the checkpoint of step {start}"
        print(f"replaying step {step} from {origin} on; steps to train anew before it: {len(taken) - 1}", flush=True)
    objective, engine = start_engine(config, world)
    try:
        if start is not None:
            resume(store, start, engine, world)
        _train_anew(config, world, objective, engine, stream, taken[:-1])
        found = document_losses(engine, objective, stream, config, first)
    finally:
        engine.close()
    loss = None
    if found.losses is not None and found.targets is not None:
        loss = float(found.losses.sum() / max(found.targets.sum(), 1))
    named = dict(zip(source_names(config), datasets, strict=True))
    rows = rows_of(found, stream.timeline.names, named)
    return Replayed(rows, loss, logged_losses(run_dir).get(step), start or 0)


def steps_taken(path: Path, stream: MixedStream, start: int, step: int) -> Iterator[Taken]:
    """The steps after `start` up to `step`, as the run's ledger has them.

    Raises ValueError for steps that it does not have, or whose documents are not those that `stream` gives now.
    """
    known = {entry.step for entry in read_ledger(path)}
    if step not in known:
        steps = f"steps {min(known)} to {max(known)}; choose one of them" if known else "no step yet"
        raise ValueError(f"step {step}: by its ledger, {path.parent} has taken {steps}")
    wanted = range(start + 1, step + 1)
    if missing := sorted(set(wanted) - known):
        raise ValueError(
            f"step {step} is to be replayed from step {start} on, but {path} has no step {missing[0]}; choose a step "
            "with a checkpoint between the two"
        )
    for entry in read_ledger(path):
        if entry.step in wanted:
            if not _same_documents(entry, stream):
                raise ValueError(
                    f"step {entry.step}: {path} has other documents than the run's sources give now; restore the "
                    f"shards and the settings that {path.parent} was trained with"
                )
            yield entry.step, entry.first, entry.batch


def _same_documents(entry: Entry, stream: MixedStream) -> bool:
    record, found = entry.record, stream.documents(entry.first, entry.batch)
    assert record is not None
    sources = [np.array(names)[of.sources] for names, of in ((entry.sources, record), (stream.timeline.names, found))]
    pairs = [sources, (record.rows, found.rows), (record.documents, found.documents), (record.offsets, found.offsets)]
    return all(np.array_equal(*pair) for pair in pairs)


def with_batch(config: RunConfig, world: World, batch: int) -> RunConfig:
    """The config for steps of `batch` samples, in micro-batches that come out even and are no larger than before, but
    for an objective that compares all samples of a step.
    """
    degrees = resolve_degrees(config.parallel, world.size)
    per_rank = batch // (degrees["dp_replicate"] * degrees["dp_shard"])
    whole = hasattr(OBJECTIVES[config.objective.name][1], "across")
    micro_batch = per_rank if whole else math.gcd(config.train.micro_batch, per_rank)
    train = config.train.model_copy(update={"global_batch": batch, "micro_batch": micro_batch})
    return config.model_copy(update={"train": train})


def _train_anew(
    config: RunConfig,
    world: World,
    objective: Any,
    engine: Engine,
    stream: MixedStream,
    taken: list[Taken],
) -> None:
    """Take these steps again."""
    began = shown = time.monotonic()
    for batch, group in groupby(taken, key=lambda one: one[2]):
        steps = list(group)
        with make_loader(with_batch(config, world, batch), engine, stream, steps[0][1]) as loader:
            for step, _, _ in steps:
                microbatches, _ = next(loader)
                lr = learning_rate(config.schedule, step - 1, config.train.steps, config.optim.lr)
                train_step(engine, objective, [objective.collate(one) for one in microbatches], lr)
                now = time.monotonic()
                if world.rank == 0 and now - shown >= QUIET:
                    done, left = step - taken[0][0] + 1, taken[-1][0] - step
                    print(f"step {step} trained anew, about {(now - began) / done * left:.0f} s to go", flush=True)
                    shown = now


def logged_losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, as the run's metrics.jsonl has it."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}

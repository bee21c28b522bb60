"""A step of a run once more: the losses of its documents, under the weights that it was taken with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.collective import Ranks
from checkpoints.manifest import STATE
from checkpoints.store import CheckpointStore
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.data import Dataset, open_datasets
from pretrain.mixture import open_stream, source_names
from pretrain.resume import Position, resume
from pretrain.schedule import learning_rate
from pretrain.spikes import document_losses, rows_of
from pretrain.train import make_loader, start_engine, train_step


class Replayed(NamedTuple):
    """rows: as `spikes.rows_of` gives them. loss: of the step now, nats a target. logged: what metrics.jsonl has."""

    rows: list[dict[str, Any]]
    loss: float | None
    logged: float | None
    start: int  # step of the checkpoint that was trained on from, 0: initial weights


def replay(config: RunConfig, world: World, step: int) -> Replayed:
    """Losses of the documents of `step`. Collective. Nothing is written.

    The newest whole checkpoint from before the step is trained on in memory up to it, with the config as it is: so the
    loss is the one that was logged, where nothing was edited in between.

    Raises ValueError for a step that the run has not taken.
    """
    run_dir, ranks = Path(config.run.dir), Ranks()
    store = CheckpointStore(run_dir / "checkpoints")
    whole = ranks.on_first(lambda: [info.step for info in store.list() if info.problem is None])
    taken = max([*whole, *logged_losses(run_dir)], default=0)
    if not 1 <= step <= taken:
        raise ValueError(f"step {step}: {run_dir} has taken steps 1 to {taken}; choose one of them")
    datasets: list[Dataset] = open_datasets(config, ranks.on_first)
    objective, engine = start_engine(config, world)
    # The newest one knows all edits of the mixture; those after the step make no difference to it.
    newest = store.folder / f"step-{max(whole, default=0):08d}" / STATE
    mixture = ranks.on_first(lambda: json.loads(newest.read_bytes()).get("mixture") if whole else None)
    start = max((found for found in whole if found < step), default=0)
    position = resume(store, start, engine, world) if start else Position()
    stream = open_stream(config, datasets, mixture, position.cursor)
    loader = make_loader(config, engine, stream, position.cursor)
    try:
        with loader:
            for done in range(start, step - 1):
                batches, position.cursor = next(loader)
                lr = learning_rate(config.schedule, done, config.train.steps, config.optim.lr)
                train_step(engine, objective, [objective.collate(batch) for batch in batches], lr)
        found = document_losses(engine, objective, stream, config, position.cursor)
    finally:
        engine.close()
    loss = None
    if found.losses is not None and found.targets is not None:
        loss = float(found.losses.sum() / max(found.targets.sum(), 1))
    named = dict(zip(source_names(config), datasets, strict=True))
    rows = rows_of(found, stream.timeline.names, named)
    return Replayed(rows, loss, logged_losses(run_dir).get(step), start)


def logged_losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, as the run's metrics.jsonl has it."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}

"""pretrain data ledger, replay"""

import argparse
from pathlib import Path

import numpy as np

from checkpoints.store import CheckpointStore
from data_pipeline.ledger import Entry, read_ledger
from parallel.world import join_world
from pretrain.config import RunConfig, load_run_config
from pretrain.data import Dataset, open_datasets
from pretrain.mixture import describe, newest_mixture, source_names, unchanged
from pretrain.replay import replay as replay_step
from pretrain.train import LEDGER


def ledger(args: argparse.Namespace) -> None:
    """The documents of a step, or the steps that a document went into; columns with tabs between."""
    run_dir = Path(args.run)
    path = run_dir / LEDGER
    history, _, _ = newest_mixture(CheckpointStore(run_dir / "checkpoints"))
    opened = _datasets(load_run_config(run_dir))
    datasets = unchanged(opened, history)
    if args.step is not None:
        entry = next(read_ledger(path, args.step), None)
        if entry is None:
            raise ValueError(f"{path} has no step {args.step}; {_steps(path)}")
        assert entry.record is not None
        _print_unknown(_used(entry), opened, datasets)
        for document in describe(entry.record, entry.sources, datasets):
            print(*document, sep="\t")
        return
    wanted = {name: dataset.find(args.document) for name, dataset in datasets.items()}
    used: set[str] = set()
    for entry in read_ledger(path):
        record = entry.record
        assert record is not None
        used |= _used(entry)
        numbers = {place: wanted[name] for place, name in enumerate(entry.sources) if name in wanted}
        found = [(record.sources == place) & np.isin(record.documents, own) for place, own in numbers.items()]
        chosen = type(record)(*(column[np.any(found, axis=0)] for column in record))
        for document in describe(chosen, entry.sources, datasets):
            print(f"step {entry.step}", *document, sep="\t")
    _print_unknown(used, opened, datasets)
    if not any(len(numbers) for numbers in wanted.values()):
        raise ValueError(f"no source of {run_dir} has a document with the key {args.document!r}; check its spelling")


def replay(args: argparse.Namespace) -> None:
    """The losses of a step's documents, under the weights that it was taken with; every rank calls it."""
    config = load_run_config(Path(args.run))
    with join_world() as world:
        found = replay_step(config, world, args.step)
        if world.rank:
            return
        for row in found.rows:
            print(*(_shown(value) for value in row.values()), sep="\t")
        if found.loss is not None:
            logged = "not logged" if found.logged is None else f"logged {found.logged:.6f}"
            print(f"# step {args.step}: loss {found.loss:.6f}, {logged}; trained on from step {found.start}")


def _datasets(config: RunConfig) -> dict[str, Dataset]:
    return dict(zip(source_names(config), open_datasets(config, lambda action: action()), strict=True))


def _used(entry: Entry) -> set[str]:
    assert entry.record is not None
    return {entry.sources[source] for source in np.unique(entry.record.sources)}


def _print_unknown(used: set[str], opened: dict[str, Dataset], datasets: dict[str, Dataset]) -> None:
    """Which of the sources `used` are not among `datasets`, and why; as a comment, which `data.skip` takes as such."""
    for name in sorted(used - datasets.keys()):
        why = "holds other data than the run has read" if name in opened else "is not in the run's recipe any more"
        print(f"# source {name!r} {why}: its documents are known by number alone")


def _steps(path: Path) -> str:
    steps = [entry.step for entry in read_ledger(path)]
    return f"it has {steps[0]} to {steps[-1]}" if steps else "it is empty"


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)

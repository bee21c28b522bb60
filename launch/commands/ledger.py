"""pretrain data ledger, replay"""

import argparse
from pathlib import Path

import numpy as np

from data_pipeline.ledger import read_ledger
from parallel.world import join_world
from pretrain.config import RunConfig, load_run_config
from pretrain.data import Dataset, open_datasets
from pretrain.mixture import describe, source_names
from pretrain.replay import replay as replay_step
from pretrain.train import LEDGER


def ledger(args: argparse.Namespace) -> None:
    """The documents of a step, or the steps that a document went into; columns with tabs between."""
    run_dir = Path(args.run)
    datasets = _datasets(load_run_config(run_dir))
    path = run_dir / LEDGER
    if args.step is not None:
        entry = next(read_ledger(path, args.step), None)
        if entry is None:
            raise ValueError(f"{path} has no step {args.step}; {_steps(path)}")
        assert entry.record is not None
        for document in describe(entry.record, entry.sources, datasets):
            print(*document, sep="\t")
        return
    wanted = {name: dataset.find(args.document) for name, dataset in datasets.items()}
    if not any(len(numbers) for numbers in wanted.values()):
        raise ValueError(f"no source of {run_dir} has a document with the key {args.document!r}; check its spelling")
    for entry in read_ledger(path):
        record = entry.record
        assert record is not None
        numbers = {place: wanted[name] for place, name in enumerate(entry.sources) if name in wanted}
        found = [(record.sources == place) & np.isin(record.documents, own) for place, own in numbers.items()]
        chosen = type(record)(*(column[np.any(found, axis=0)] for column in record))
        for document in describe(chosen, entry.sources, datasets):
            print(f"step {entry.step}", *document, sep="\t")


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


def _steps(path: Path) -> str:
    steps = [entry.step for entry in read_ledger(path)]
    return f"it has {steps[0]} to {steps[-1]}" if steps else "it is empty"


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)

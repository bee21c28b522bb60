"""The run's sources as one stream: mixed as the recipe says, on from where a checkpoint was, less what is skipped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.retention import find_step
from checkpoints.state import saved_state
from checkpoints.store import CheckpointStore
from data_pipeline.ledger import Record
from data_pipeline.mix import MixedStream
from data_pipeline.timeline import Share, Timeline
from pretrain.config import RunConfig
from pretrain.data import Dataset, make_stream
from pretrain.sections import SourceConfig


class Document(NamedTuple):
    """A document as a person is told of it; `start`: its first token (0 for pictures) in the sample. Where the source
    cannot be asked any more, `shard` is "?" and `key` its number there.
    """

    source: str
    shard: str
    key: str
    start: int


def open_stream(
    config: RunConfig, datasets: list[Dataset], saved: list[Any] | None = None, cursor: int = 0, step: int = 0
) -> MixedStream:
    """The training samples, all sources mixed by weight.

    saved: the mixture's history out of the checkpoint of `step`, which goes on from sample `cursor` as the recipe says
    now. Raises ValueError where that cannot be, or the sources are used up before the run ends.
    """
    names = source_names(config)
    skips = read_skips(Path(config.data.skip)) if config.data.skip else []
    streams = {}
    for name, dataset in zip(names, datasets, strict=True):
        skipped = find_skips(skips, name, dataset)
        streams[name] = make_stream(config, dataset, skipped=skipped)
    shares = _shares(config, list(streams.values()), datasets)
    timeline = Timeline.of(shares) if saved is None else Timeline.from_state(saved).edited(cursor, shares)
    if step < config.train.steps:
        timeline.where(cursor + (config.train.steps - step) * config.train.global_batch - 1, 1)
    return MixedStream(streams, timeline)


def newest_mixture(store: CheckpointStore) -> tuple[list[Any] | None, int, int]:
    """The mixture's history as the newest whole checkpoint has it, and that one's cursor and step; None, 0, 0 without.

    It knows all edits: what came after a sample makes no difference to it.
    """
    step = store.newest_whole()
    if step is None:
        return None, 0, 0
    state = saved_state(find_step(store.folder, step))
    return state.get("mixture"), state.get("cursor", 0), step


def source_names(config: RunConfig) -> list[str]:
    """What the run remembers its sources by."""
    return [source.name or source.shards for source in config.data.sources] or ["built-in"]


def _shares(config: RunConfig, streams: list[Any], datasets: list[Dataset]) -> list[Share]:
    sources = config.data.sources or (SourceConfig(shards="built-in"),)
    shares = []
    for name, source, stream, dataset in zip(source_names(config), sources, streams, datasets, strict=True):
        steps = source.weight if isinstance(source.weight, tuple) else ((0, source.weight),)
        size = stream.num_samples ** (1 / config.data.temperature) if config.data.temperature else 1.0
        weights = tuple((-(-tokens // config.data.seq_len), weight * size) for tokens, weight in steps)
        cap = max(1, int(source.epochs * stream.num_samples)) if source.epochs else None
        shares.append(Share(name, weights, cap, dataset.fingerprint))
    return shares


def read_skips(path: Path) -> list[tuple[str, str, str]]:
    """(source, shard, key) of documents to leave out, a line each, tab between; or a key alone, wherever it is.

    What follows in a line is not looked at, nor are empty lines and those that begin with #: the lines that `pretrain
    data ledger` prints are such lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.skip = {str(path)!r}: no such file; name a file of documents, or leave it out")
    skips = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if len(fields) == 2:
            raise ValueError(f"{path}: line {number}: give source, shard and key with tabs between, or a key alone")
        skips.append(("", "", line.strip()) if len(fields) == 1 else (fields[0], fields[1], fields[2]))
    return skips


def find_skips(skips: list[tuple[str, str, str]], source: str, dataset: Dataset) -> list[int]:
    """Numbers of the documents of a source that the list names."""
    found = []
    for of_source, shard, key in skips:
        if of_source in ("", source):
            found += [n for n in dataset.find(key).tolist() if shard in ("", shard_name(dataset, n))]
    return found


def shard_name(dataset: Dataset, document: int) -> str:
    """File name of the shard that holds a document."""
    shard = dataset.shard_of(document)
    return str(dataset.names[shard] if isinstance(shard, int) else shard).rpartition("/")[2]


def unchanged(datasets: dict[str, Dataset], history: list[Any] | None) -> dict[str, Dataset]:
    """Those sources, by name, that hold what the run has read of them, as the mixture's history says."""
    phases = Timeline.from_state(history or []).phases
    read = {share.name: share.data for phase in phases for share in phase.shares}
    return {name: found for name, found in datasets.items() if read.get(name, found.fingerprint) == found.fingerprint}


def describe(record: Record, names: list[str], datasets: dict[str, Dataset]) -> Iterator[Document]:
    """The documents of a record, in its order; those of a source that is not among `datasets` by number."""
    for source, number, offset in zip(*(column.tolist() for column in record[1:]), strict=True):
        name = names[source]
        if name in datasets:
            yield Document(name, shard_name(datasets[name], number), datasets[name].key(number), offset)
        else:
            yield Document(name, "?", f"document {number}", offset)


def number_documents(record: Record, documents: np.ndarray, first_row: int) -> np.ndarray:
    """Place in `record` of the document of each token, -1 for padding. documents: int32 [B, S] of the rows from
    `first_row` of the step on, each numbered from 0 along the row.
    """
    begins = np.searchsorted(record.rows, np.arange(first_row, first_row + len(documents)))
    return np.where(documents >= 0, begins[:, None] + documents, -1)

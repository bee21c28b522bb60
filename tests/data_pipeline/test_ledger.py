"""What went into each step, written and read back."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.ledger import Ledger, Record, read_ledger
from data_pipeline.mix import MixedStream
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.timeline import Share, Timeline
from tests.data_pipeline.conftest import unique_documents


@pytest.fixture
def stream(write_shards) -> MixedStream:
    streams = {}
    for name, lengths in (("a", [5, 40, 3] * 30), ("b", [17] * 60)):
        folder = write_shards(unique_documents(lengths), name, num_shards=2, vocab_size=5000)
        streams[name] = TokenStream(TokenDataset(folder / "train-*.tar"), seq_len=16, seed=3)
    return MixedStream(streams, Timeline.of([Share("a", ((0, 2.0),)), Share("b")]))


def steps_of(path: Path) -> list[tuple]:
    return [(e.step, e.first, e.sources, [c.tolist() for c in e.record]) for e in read_ledger(path)]


def fill(path: Path, stream: MixedStream, steps: range, size: int = 8) -> None:
    with Ledger(path, steps.start - 1, stream.timeline.names, stream.documents, size) as ledger:
        for step in steps:
            ledger.add(step, (step - 1) * size)
            if step % 7 == 0:
                ledger.sync()  # as before a checkpoint


def test_the_documents_named_are_those_of_the_samples(stream, tmp_path) -> None:
    """Every row is put together again from what the ledger says of it."""
    fill(tmp_path / "l", stream, range(1, 40))
    entries = list(read_ledger(tmp_path / "l"))
    assert [entry.step for entry in entries] == list(range(1, 40))
    for entry in entries:
        samples, record = stream.read(entry.first, 8), entry.record
        assert record is not None
        for row in range(8):
            at = 0
            own = np.flatnonzero(record.rows == row)
            for number, place in enumerate(own.tolist()):
                dataset = stream.streams[entry.sources[record.sources[place]]].dataset
                tokens = dataset.document(int(record.documents[place]))[record.offsets[place] :][: 16 - at]
                assert samples.tokens[row, at : at + len(tokens)].tolist() == tokens.tolist()
                assert (samples.documents[row, at : at + len(tokens)] == number).all()
                at += len(tokens)
            assert at == 16


def test_a_resume_drops_later_steps_and_a_torn_end(stream, tmp_path) -> None:
    fill(tmp_path / "whole", stream, range(1, 11))
    fill(tmp_path / "cut", stream, range(1, 13))
    torn = (tmp_path / "cut").read_bytes()
    for lost in (1, 20, 40):
        (tmp_path / "cut").write_bytes(torn[:-lost])
        assert len(steps_of(tmp_path / "cut")) == 7
    (tmp_path / "cut").write_bytes(torn[:-9] + b"\x00" + torn[-8:])
    assert len(steps_of(tmp_path / "cut")) == 7, "a changed byte is seen"
    fill(tmp_path / "cut", stream, range(8, 11))
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [found[0] for found in steps_of(tmp_path / "cut")] == list(range(1, 11))
    assert [entry.step for entry in read_ledger(tmp_path / "cut", 7)] == [7]


def test_sources_that_are_added_later_have_numbers_of_their_own(stream, tmp_path) -> None:
    record = stream.documents(0, 4)
    with Ledger(tmp_path / "l", 0, ["a", "b"], lambda *_: record, 4) as ledger:
        ledger.add(1, 0)
    with Ledger(tmp_path / "l", 1, ["a", "b", "c"], lambda *_: record, 4) as ledger:
        ledger.add(2, 4)
    assert [entry.sources for entry in read_ledger(tmp_path / "l")] == [["a", "b"], ["a", "b", "c"]]


def test_a_few_bytes_a_document(tmp_path) -> None:
    """A million documents, some of them beginning in an earlier sample."""
    rng = np.random.default_rng(0)
    count = 20_000
    offsets = np.where(rng.random(count) < 0.2, rng.integers(0, 4000, count), 0)
    record = Record(
        np.sort(rng.integers(0, 4096, count)), rng.integers(0, 3, count), rng.integers(0, 10**6, count), offsets
    )
    with Ledger(tmp_path / "l", 0, ["a"], lambda *_: record, 4096) as ledger:
        ledger.add(1, 0)
    assert (tmp_path / "l").stat().st_size / count < 5
    entry = next(read_ledger(tmp_path / "l"))
    assert entry.record is not None
    for column, again in zip(record, entry.record, strict=True):
        assert (column == again).all()


def test_what_is_no_ledger_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no ledger"):
        list(read_ledger(tmp_path / "none"))
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no ledger of this version; move it away"):
        Ledger(tmp_path / "other", 0, ["a"], lambda *_: None, 1)

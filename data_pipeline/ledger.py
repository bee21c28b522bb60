"""Which documents went into each training step: an append-only file, a few bytes a document.

    magic   record   record   ...
    record: kind, step, first sample, samples of a step, entries, bytes, CRC-32 (little-endian, 37 bytes), and the bytes
        kind 1  the sources, JSON: their numbers in later records are places in this list
        kind 2  steps, from that one on: columns row, source, document, offset in the least unsigned types that hold
                them, byte by byte; rows count on from step to step

The bytes are zlib's. Some steps are written together, and what is due before each checkpoint. A record that was torn by
a crash ends the file, and is written over.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

MAGIC = b"PTLEDG\x00\x01"
HEAD = struct.Struct("<BQQIQII")
SOURCES, STEPS = 1, 2
AT_ONCE = 16  # steps written together: what is known of 16 is found in little more time than of one
FASTEST = 1  # zlib's level: what is random does not shrink, and the rest does at once


class Record(NamedTuple):
    """The documents of a step, [n] each, by ascending row."""

    rows: np.ndarray  # sample of the step
    sources: np.ndarray  # number of the source
    documents: np.ndarray  # number in the source's shards
    offsets: np.ndarray  # the document's first token there


class Entry(NamedTuple):
    """A step of the ledger, or the sources from there on (``record`` None)."""

    step: int
    first: int  # global index of its first sample
    batch: int  # samples of a step
    sources: list[str]
    record: Record | None


class Ledger:
    """Appends to a ledger; one process of a run has it open.

    Args:
        path: of the file, made where there is none.
        step: records of later steps are dropped: they come again.
        sources: names of the sources, by number.
        documents: (first sample, number of samples) -> what they are made of.
        batch: samples of a step.

    Raises:
        ValueError: the file is no ledger.
    """

    def __init__(
        self, path: Path, step: int, sources: list[str], documents: Callable[[int, int], Record], batch: int
    ) -> None:
        if not path.is_file():
            path.write_bytes(MAGIC)
        end, known = len(MAGIC), None
        for at, entry in _scan(path):
            if entry.step > step:
                break
            end, known = at, entry.sources
        self._documents, self._batch, self._waiting = documents, batch, 0
        self._file: IO[bytes] = path.open("r+b", buffering=0)
        self._file.truncate(end)
        self._file.seek(end)
        if sources != known:
            self._write(SOURCES, step, 0, 0, json.dumps(sources).encode())

    def add(self, step: int, first: int) -> None:
        """Keep what step ``step`` is made of, whose first sample is ``first``; steps come one after the other."""
        if not self._waiting:
            self._step, self._first = step, first
        self._waiting += 1
        if self._waiting == AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        record = self._documents(self._first, self._waiting * self._batch)
        columns = [_narrow(column) for column in record]
        kinds = "".join(column.dtype.char for column in columns).encode()
        planes = b"".join(column.view(np.uint8).reshape(len(column), -1).T.tobytes() for column in columns)
        self._write(STEPS, self._step, self._first, len(record.rows), kinds + planes)
        self._waiting = 0

    def _write(self, kind: int, step: int, first: int, count: int, content: bytes) -> None:
        packed = zlib.compress(content, FASTEST)
        head = HEAD.pack(kind, step, first, self._batch, count, len(packed), zlib.crc32(packed))
        self._file.write(head + packed)

    def sync(self) -> None:
        """Write what waits, and make it survive a power cut."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_ledger(path: Path, step: int | None = None) -> Iterator[Entry]:
    """The steps of a ledger in order, or the one asked for.

    Raises:
        FileNotFoundError: there is none. ValueError: the file is no ledger.
    """
    for _, entry in _scan(path):
        if entry.record is not None and step in (None, entry.step):
            yield entry


def _scan(path: Path) -> Iterator[tuple[int, Entry]]:
    """(end of its record in the file, entry) of each step and each list of sources, as far as records are whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no ledger; it is written while a run trains")
    sources: list[str] = []
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: is no ledger of this version; move it away, the next start begins a new one")
        while len(head := file.read(HEAD.size)) == HEAD.size:
            kind, step, first, batch, count, size, crc = HEAD.unpack(head)
            packed = file.read(size)
            if len(packed) < size or zlib.crc32(packed) != crc:
                return
            if kind == SOURCES:
                sources = json.loads(zlib.decompress(packed))
                yield file.tell(), Entry(step, first, batch, sources, None)
                continue
            record = _record(zlib.decompress(packed), count)
            steps = int(record.rows[-1]) // batch + 1
            bounds = np.searchsorted(record.rows, np.arange(steps + 1) * batch).tolist()
            for number, (begin, end) in enumerate(pairwise(bounds)):
                own = Record(*(column[begin:end] for column in record))
                own = own._replace(rows=own.rows - number * batch)
                yield file.tell(), Entry(step + number, first + number * batch, batch, sources, own)


def _record(content: bytes, count: int) -> Record:
    columns, at = [], len(Record._fields)
    for kind in content[:at].decode():
        width = np.dtype(kind).itemsize
        planes = np.frombuffer(content, np.uint8, count * width, at).reshape(width, count)
        columns.append(np.ascontiguousarray(planes.T).view(f"<{kind}")[:, 0].astype(np.int64))
        at += count * width
    return Record(*columns)


def _narrow(column: np.ndarray) -> np.ndarray:
    dtype: Any = np.min_scalar_type(int(column.max(initial=0)))
    return np.ascontiguousarray(column.astype(dtype.newbyteorder("<")))

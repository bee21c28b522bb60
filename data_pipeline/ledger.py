"""Which documents went into each training step: an append-only file, a few bytes a document.

    magic   record   record   ...
    record: kind, step, first sample, number of entries, bytes, CRC-32 (little-endian, 33 bytes) and the bytes, zlib
        kind 1  the sources, JSON: their numbers in later records are places in this list
        kind 2  a step: columns row, source, document, offset, in the least unsigned types that hold them, byte by byte

A record that was torn by a crash ends the file, and is written over.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

MAGIC = b"PTLEDG\x00\x01"
HEAD = struct.Struct("<BQQQII")
SOURCES, STEP = 1, 2
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
    sources: list[str]
    record: Record | None


class Ledger:
    """Appends to a ledger; one process of a run has it open.

    Args:
        path: of the file, made where there is none.
        step: records of later steps are dropped: they come again.
        sources: names of the sources, by number.

    Raises:
        ValueError: the file is no ledger.
    """

    def __init__(self, path: Path, step: int, sources: list[str]) -> None:
        if not path.is_file():
            path.write_bytes(MAGIC)
        end, known = len(MAGIC), None
        for at, entry in _scan(path):
            if entry.step > step:
                break
            end, known = at, entry.sources
        self._file: IO[bytes] = path.open("r+b", buffering=0)
        self._file.truncate(end)
        self._file.seek(end)
        if sources != known:
            self._write(SOURCES, step, 0, 0, json.dumps(sources).encode())

    def append(self, step: int, first: int, record: Record) -> None:
        """Keep what step ``step`` is made of; its first sample is ``first``."""
        columns = [_narrow(column) for column in record]
        kinds = "".join(column.dtype.char for column in columns).encode()
        planes = b"".join(column.view(np.uint8).reshape(len(column), -1).T.tobytes() for column in columns)
        self._write(STEP, step, first, len(record.rows), kinds + planes)

    def _write(self, kind: int, step: int, first: int, count: int, content: bytes) -> None:
        packed = zlib.compress(content, FASTEST)
        self._file.write(HEAD.pack(kind, step, first, count, len(packed), zlib.crc32(packed)) + packed)

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
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
    for _, entry in _scan(path, step):
        if entry.record is not None:
            yield entry


def _scan(path: Path, only: int | None = None) -> Iterator[tuple[int, Entry]]:
    """(end in the file, entry) of each whole record; the documents of other steps than ``only`` are not unpacked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no ledger; it is written while a run trains")
    sources: list[str] = []
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: is no ledger of this version; move it away, the next start begins a new one")
        while len(head := file.read(HEAD.size)) == HEAD.size:
            kind, step, first, count, size, crc = HEAD.unpack(head)
            packed = file.read(size)
            if len(packed) < size or zlib.crc32(packed) != crc:
                return
            if kind == SOURCES:
                sources = json.loads(zlib.decompress(packed))
                yield file.tell(), Entry(step, first, sources, None)
            elif only is None or step == only:
                yield file.tell(), Entry(step, first, sources, _record(zlib.decompress(packed), count))


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

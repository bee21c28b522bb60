"""Documents out of text files, JSON lines (plain, .gz, .zst) and parquet, one bad record at a time."""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"


@dataclass(frozen=True)
class Piece:
    """A part of one input that is read from start to stop: the whole file, a byte range, or one row group.

    ``name`` is the path below the inputs' common folder, equal on every machine; ``num_bytes`` is on disk.
    """

    path: str
    name: str
    kind: str
    start: int
    stop: int
    num_bytes: int


class Document(NamedTuple):
    text: str
    source: str  # the file's name, with @position for a record in it
    whole_file: bool


class Reject(NamedTuple):
    source: str
    reason: str  # one of a few kinds, so that they can be counted
    detail: str = ""
    lost_bytes: int = 0  # size of the piece that could not be read to its end: how much it held is unknown


def plan_pieces(paths: list[Path], *, piece_bytes: int, text_field: str) -> list[Piece]:
    """Cut the inputs into pieces of about ``piece_bytes``, in the order of their names.

    Raises:
        ValueError: a library that an input needs is not installed.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 (resolve would follow links)
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    return [
        piece
        for path in sorted(set(absolute))
        for piece in _cut(path, path.relative_to(root).as_posix(), piece_bytes, text_field)
    ]


def _cut(path: Path, name: str, piece_bytes: int, text_field: str) -> Iterator[Piece]:
    size = path.stat().st_size
    kind = _kind(path)
    if path.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise ValueError(f"{path}: .zst needs zstandard; pip install 'pretrain-stack[zstd]'")
    if kind == PARQUET:
        for group, num_bytes in enumerate(_row_groups(path, text_field)):
            yield Piece(str(path), name, kind, group, group + 1, num_bytes)
    elif kind == JSONL and path.suffix not in (".gz", ".zst"):
        for start in range(0, size, piece_bytes):
            stop = min(start + piece_bytes, size)
            yield Piece(str(path), name, kind, start, stop, stop - start)
    else:
        yield Piece(str(path), name, kind, 0, size, size)


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    last = suffixes[-1].lower() if suffixes else ""
    return JSONL if last in (".jsonl", ".ndjson") else PARQUET if last == ".parquet" else TEXT


def read_piece(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    """The piece's documents and rejected records, in order. Nothing in the data raises."""
    read = {TEXT: _read_text, JSONL: _read_jsonl, PARQUET: _read_parquet}[piece.kind]
    try:
        yield from read(piece, text_field)
    except (OSError, EOFError, zlib.error) as error:
        detail = f"{type(error).__name__}: {error}; the rest of the file is left out"
        yield Reject(piece.name, "unreadable", detail, piece.num_bytes)


def _read_text(piece: Piece, _: str) -> Iterator[Document | Reject]:
    with _open(piece.path) as file:
        yield _document(file.read(), piece.name, whole_file=True)


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    whole = piece.path.endswith((".gz", ".zst"))
    with _open(piece.path) as file:
        position = 0
        if piece.start:  # a line belongs to the piece it begins in
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())
        while whole or position < piece.stop:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield _record(line, f"{piece.name}@{position}", text_field)
            position += len(line)


def _record(line: bytes, source: str, text_field: str) -> Document | Reject:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Reject(source, "invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Reject(source, "invalid JSON", str(error))
    if not isinstance(record, dict) or text_field not in record:
        return Reject(source, "missing field", f"no field {text_field!r}")
    return _document(record[text_field], source)


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Document | Reject]:
    from pyarrow import ArrowException, parquet

    source = piece.name
    try:
        with parquet.ParquetFile(piece.path) as file:
            names, position = file.schema_arrow.names, 0
            if text_field not in names:
                detail = f"no column {text_field!r}, it has {', '.join(names)}"
                yield Reject(piece.name, "missing field", detail, piece.num_bytes)
                return
            source = f"{piece.name}@{piece.start}"
            for batch in file.iter_batches(256, row_groups=[piece.start], columns=[text_field]):
                for value in batch.column(0):
                    record = f"{source}:{position}"
                    try:
                        yield _document(value.as_py(), record)
                    except UnicodeDecodeError as error:
                        yield Reject(record, "invalid UTF-8", str(error))
                    position += 1
    except (ArrowException, OSError) as error:
        yield Reject(source, "unreadable", f"{error}; the rest of it is left out", piece.num_bytes)


def _row_groups(path: Path, text_field: str) -> list[int]:
    """Bytes of the text column in each row group; a file without any such column, or that is no parquet file, counts
    as one, which is rejected when it is read.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install 'pretrain-stack[parquet]'") from error

    try:
        with parquet.ParquetFile(path) as file:
            names, meta = file.schema_arrow.names, file.metadata
            if text_field not in names:
                return [path.stat().st_size]
            groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
            return [
                sum(
                    group.column(at).total_uncompressed_size
                    for at in range(group.num_columns)
                    if group.column(at).path_in_schema.partition(".")[0] == text_field
                )
                for group in groups
            ]
    except (ArrowException, OSError):
        return [path.stat().st_size]


def _document(value: object, source: str, *, whole_file: bool = False) -> Document | Reject:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return Reject(source, "invalid UTF-8", f"byte {error.start}: {error.reason}")
    if value is None:
        return Reject(source, "missing field", "null")
    if not isinstance(value, str):
        return Reject(source, "not text", f"the field is {type(value).__name__}")
    if not value.strip():
        return Reject(source, "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Reject(source, "invalid Unicode", f"letter {error.start}: {error.reason}")
    return Document(value, source, whole_file)


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    elif path.endswith(".zst"):
        import zstandard

        with Path(path).open("rb") as raw, io.BufferedReader(_ZstdReader(raw, zstandard)) as file:
            yield file
    else:
        with Path(path).open("rb") as file:
            yield file


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file; the library's own reader takes a truncated file for a whole one."""

    def __init__(self, raw: IO[bytes], zstandard: ModuleType) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest, self._ready, self._inside = b"", b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read(1 << 17)
            if not data:
                if self._inside:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            try:
                self._ready = self._frame.decompress(data)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._rest, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

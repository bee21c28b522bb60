"""Token shards on disk: WebDataset tars, beside each its index (index.py), and what a folder of them shares.

A document is one WebDataset sample: ``KEY.tokens`` (little-endian uint16 or uint32) and ``KEY.json`` (source,
text bytes, number of tokens). ``dataset.json`` says once a folder what all its shards share.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from data_pipeline.index import BLOCK, END_OF_ARCHIVE, FORMAT_VERSION, TOKEN_DTYPES, ShardIndex, index_path, make_index
from data_pipeline.paths import write_atomic

DATASET_FILE = "dataset.json"
HEADER_MODE = b"0000644\0" + 2 * b"0000000\0"  # mode, user, group
HEADER_TIME = b"00000000000\0"  # equal builds give equal bytes
HEADER_END = b"0".ljust(101, b"\0") + b"ustar\00000".ljust(255, b"\0")  # a plain file, format version 00
HEADER_SUM = sum(HEADER_MODE) + sum(HEADER_TIME) + sum(b" " * 8) + sum(HEADER_END)  # the checksum counts as spaces


def token_dtype(vocab_size: int) -> str:
    """The smallest little-endian dtype name that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class DatasetInfo:
    """What all shards of a folder share, kept in its ``dataset.json``.

    ``counts`` maps a split to its numbers of shards, documents, tokens and text bytes; ``tokenizer`` is a
    folder relative to the file.
    """

    vocab_size: int
    dtype: str
    eos_id: int
    tokenizer: str = "tokenizer"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        write_atomic(folder / DATASET_FILE, json.dumps(asdict(self), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The folder's description, or None when there is none (shards made elsewhere)."""
        path = folder / DATASET_FILE
        if not path.is_file():
            return None
        try:
            info = cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a dataset description ({error}); build the shards again") from error
        if info.format_version > FORMAT_VERSION or info.dtype not in TOKEN_DTYPES:
            raise ValueError(
                f"{path}: format version {info.format_version} with dtype {info.dtype!r}, readable are "
                f"versions up to "
                f"{FORMAT_VERSION} with uint16 or uint32; update this package"
            )
        return info


class ShardWriter:
    """Writes one shard and its index; both appear under their names only when ``close`` succeeds."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        self._partial = path.with_name(path.name + ".partial")
        self._file: IO[bytes] = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._rows: list[tuple[int, int, int]] = []
        self._keys: list[str] = []
        self._max_token = 0

    def add(self, key: str, tokens: np.ndarray, facts: Mapping[str, Any], *, text_bytes: int) -> None:
        """Append a document of ``tokens`` [n]; ``facts`` go into its json beside ``text_bytes`` and
        ``num_tokens``.
        """
        largest = int(tokens.max(initial=0))
        if largest > np.iinfo(self.dtype).max:
            raise ValueError(f"{self.path}: token {largest} does not fit {self.dtype.name}; use a larger vocab_size")
        about = {**facts, "text_bytes": text_bytes, "num_tokens": len(tokens)}
        self._rows.append((self._size + BLOCK, len(tokens), text_bytes))
        self._keys.append(key)
        self._max_token = max(self._max_token, largest)
        self._member(f"{key}.tokens", tokens.astype(self.dtype, copy=False).tobytes())
        self._member(f"{key}.json", json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode())

    def _member(self, name: str, payload: bytes) -> None:
        self._write(tar_header(name.encode(), len(payload)) + payload + bytes(-len(payload) % BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self) -> ShardIndex:
        self._write(END_OF_ARCHIVE)
        self._file.close()
        index = make_index(
            self._rows,
            self._keys,
            dtype=self.dtype.name,
            shard_size=self._size,
            sha256=self._hash.hexdigest(),
            max_token=self._max_token,
        )
        index.save(index_path(self.path))
        self._partial.replace(self.path)
        return index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def tar_header(name: bytes, size: int) -> bytes:
    """The POSIX ustar header of a file of ``size`` bytes; much faster than tarfile's, as short documents need."""
    if len(name) > 100 or size >= 8**11:
        raise ValueError(f"tar member {name!r} of {size} bytes: names have at most 100 bytes, files less than 8 GiB")
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (HEADER_SUM + sum(name) + sum(length))
    return b"".join((name.ljust(100, b"\0"), HEADER_MODE, length, HEADER_TIME, checksum, HEADER_END))

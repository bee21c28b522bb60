"""Token shards on disk: WebDataset tars, and beside each an index that makes every document directly
addressable.

A document is one WebDataset sample: ``KEY.tokens`` (little-endian uint16 or uint32) and ``KEY.json`` (source,
text bytes, number of tokens). ``SHARD.tar.idx`` is a safetensors file: arrays ``offsets`` (bytes into the
tar), ``lengths`` (tokens), ``text_bytes`` (-1 unknown), ``keys`` (zero-padded UTF-8 rows), and the shard's
size, sha256, dtype and largest token in its metadata. ``dataset.json`` says once a folder what all its shards
share.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

FORMAT_VERSION = 1
INDEX_SUFFIX = ".idx"
DATASET_FILE = "dataset.json"
BLOCK = 512  # tar's unit: payloads start on a block, so the bytes of a whole shard can be viewed as tokens
END_OF_ARCHIVE = bytes(2 * BLOCK)
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
        if info.format_version > FORMAT_VERSION or info.dtype not in ("uint16", "uint32"):
            raise ValueError(
                f"{path}: format version {info.format_version} with dtype {info.dtype!r}, readable are "
                f"versions up to "
                f"{FORMAT_VERSION} with uint16 or uint32; update this package"
            )
        return info


@dataclass(frozen=True)
class ShardIndex:
    """Where the documents of one shard lie. Arrays have one entry a document."""

    offsets: np.ndarray  # int64, bytes from the start of the tar
    lengths: np.ndarray  # int64, tokens
    text_bytes: np.ndarray  # int64, UTF-8 bytes of the text; -1 unknown
    keys: np.ndarray  # uint8 [documents, width]
    dtype: str
    shard_size: int
    sha256: str
    max_token: int

    def key(self, document: int) -> str:
        return self.keys[document].tobytes().rstrip(b"\0").decode()

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in ("offsets", "lengths", "text_bytes", "keys")}
        facts = {name: getattr(self, name) for name in ("dtype", "shard_size", "sha256", "max_token")}
        # One metadata entry: safetensors writes several in random order, and equal builds must give equal
        # bytes.
        blob = json.dumps({"format_version": FORMAT_VERSION, **facts}, sort_keys=True)
        write_atomic(path, save_safetensors(arrays, metadata={"shard": blob}))

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["shard"])
                if facts.pop("format_version") > FORMAT_VERSION:
                    raise ValueError("written by a newer version")
                arrays = {name: file.get_tensor(name) for name in ("offsets", "lengths", "text_bytes", "keys")}
                return cls(**arrays, **facts)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a shard index ({error}); remove it and it is built again") from error

    def check(self, shard: Path) -> None:
        """Refuse an index that was not made for this file: sizes, and offsets that point outside it."""
        size = shard.stat().st_size
        cure = f"restore the shard, or remove {shard.name}{INDEX_SUFFIX} to have it built again"
        if size != self.shard_size:
            state = "truncated" if size < self.shard_size else "changed"
            raise ValueError(f"{shard}: {state}: {size} bytes, its index was made for {self.shard_size}; {cure}")
        if len({len(self.offsets), len(self.lengths), len(self.text_bytes), len(self.keys)}) != 1:
            raise ValueError(f"{shard}: its index has arrays of different lengths; {cure}")
        item = np.dtype(self.dtype).itemsize
        ends = self.offsets + self.lengths * item
        bad = (self.offsets < 0) | (self.lengths < 0) | (ends > size) | (self.offsets % item != 0)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{shard}: its index disagrees with it: document {first} at bytes {self.offsets[first]} to "
                f"{ends[first]} of {size}; {cure}"
            )


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
        index.save(self.path.with_name(self.path.name + INDEX_SUFFIX))
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


def make_index(rows: list[tuple[int, int, int]], keys: list[str], **facts: Any) -> ShardIndex:
    """An index from (offset, tokens, text bytes) rows."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    encoded = [key.encode() for key in keys]
    width = max([len(key) for key in encoded], default=0) or 1
    padded = np.frombuffer(b"".join(key.ljust(width, b"\0") for key in encoded), dtype=np.uint8)
    columns = [np.ascontiguousarray(column) for column in table.T]
    return ShardIndex(columns[0], columns[1], columns[2], padded.reshape(-1, width), **facts)


def scan_shard(shard: Path, dtype: str) -> ShardIndex:
    """Build the index of a shard made elsewhere (webdataset's own writer, say) by reading it once from end to end."""
    item = np.dtype(dtype).itemsize
    rows: dict[str, tuple[int, int]] = {}  # key -> offset, tokens
    text_bytes: dict[str, int] = {}
    max_token, others = 0, set()
    with shard.open("rb") as file:
        _check_end(shard, file)
        try:
            for member in tarfile.open(fileobj=file, mode="r:"):  # noqa: SIM115 (it owns nothing but file)
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                file.seek(member.offset_data)
                if extension == "tokens":
                    if key in rows:
                        raise ValueError(f"{shard}: key {key} occurs twice; keys must be unique in a shard")
                    if member.size % item:
                        raise ValueError(
                            f"{shard}: {member.name} has {member.size} bytes, not a multiple of {dtype}'s {item}; the "
                            f"dtype or vocab_size given is not the one it was written with"
                        )
                    tokens = np.frombuffer(file.read(member.size), dtype)
                    max_token = max(max_token, int(tokens.max(initial=0)))
                    rows[key] = (member.offset_data, len(tokens))
                elif extension == "json":
                    text_bytes[key] = _text_bytes(file.read(member.size))
                else:
                    others.add(extension)
        except tarfile.TarError as error:
            raise ValueError(f"{shard}: truncated or not a tar ({error}); restore it or build it again") from error
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not rows:
        found = ", ".join(sorted(others)) or "nothing"
        raise ValueError(f"{shard}: holds no .tokens member (found: {found}); build token shards from the text first")
    table = [(*row, text_bytes.get(key, -1)) for key, row in rows.items()]
    facts = {"dtype": dtype, "shard_size": shard.stat().st_size, "sha256": sha256, "max_token": max_token}
    return make_index(table, list(rows), **facts)


def _check_end(shard: Path, file: IO[bytes]) -> None:
    size = shard.stat().st_size
    file.seek(max(size - len(END_OF_ARCHIVE), 0))
    if size % BLOCK or file.read() != END_OF_ARCHIVE:
        raise ValueError(f"{shard}: truncated or not a tar: no end-of-archive mark; restore it or build it again")
    file.seek(0)


def load_index(shard: Path, dtype: str) -> ShardIndex:
    """The checked index of a shard; one without an index is scanned, and the result kept beside it where
    possible.
    """
    path = shard.with_name(shard.name + INDEX_SUFFIX)
    if path.is_file():
        index = ShardIndex.load(path)
        index.check(shard)
        if index.dtype != dtype:
            raise ValueError(
                f"{shard}: holds {index.dtype} tokens, {dtype} is expected for this vocabulary; the shard "
                f"belongs to "
                f"another tokenizer"
            )
        return index
    index = scan_shard(shard, dtype)
    if os.access(shard.parent, os.W_OK):
        index.save(path)
    return index


def verify_shard(shard: Path) -> None:
    """Read a shard from end to end and compare it with its index's checksum."""
    index = ShardIndex.load(shard.with_name(shard.name + INDEX_SUFFIX))
    index.check(shard)
    with shard.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != index.sha256:
        raise ValueError(f"{shard}: sha256 {found}, its index says {index.sha256}; the shard is damaged, restore it")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; safe when several processes write the same one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _text_bytes(blob: bytes) -> int:
    try:
        return int(json.loads(blob)["text_bytes"])
    except (ValueError, KeyError, TypeError):
        return -1

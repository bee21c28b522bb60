"""The index beside a token shard, which makes every document of the tar directly addressable.

``SHARD.tar.idx`` is a safetensors file: arrays ``offsets`` (bytes into the tar), ``lengths`` (tokens),
``text_bytes`` (-1 unknown), ``keys`` (zero-padded UTF-8 rows), and the shard's size, sha256, dtype and largest
token in its metadata. A shard made elsewhere gets its index when it is first read.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from data_pipeline.paths import write_atomic
from data_pipeline.places import Shard

FORMAT_VERSION = 1
INDEX_SUFFIX = ".idx"
TOKEN_DTYPES = ("uint16", "uint32")
BLOCK = 512  # tar's unit: payloads start on a block, so the bytes of a whole shard can be viewed as tokens
END_OF_ARCHIVE = bytes(2 * BLOCK)
ARRAYS = {"offsets": np.int64, "lengths": np.int64, "text_bytes": np.int64, "keys": np.uint8}
FACTS = {"dtype": str, "shard_size": int, "sha256": str, "max_token": int}
MEMBERS_AT_ONCE = 1024  # between two reports of progress


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
        return self._key(document).decode(errors="replace")

    def _key(self, document: int) -> bytes:
        return self.keys[document].tobytes().rstrip(b"\0")

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        facts = {name: getattr(self, name) for name in FACTS}
        # One metadata entry: safetensors writes several in random order, and equal builds must give equal
        # bytes.
        blob = json.dumps({"format_version": FORMAT_VERSION, **facts}, sort_keys=True)
        write_atomic(path, save_safetensors(arrays, metadata={"shard": blob}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an index. Raises ValueError when the file is not one."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["shard"])
                if facts["format_version"] > FORMAT_VERSION:
                    raise ValueError("written by a newer version")
                index = cls(**{name: file.get_tensor(name) for name in ARRAYS}, **{name: facts[name] for name in FACTS})
            index._check_types()
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a shard index ({error}); remove it and it is built again") from error
        return index

    def _check_types(self) -> None:
        for name, kind in FACTS.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not of type {kind.__name__}")
        if self.dtype not in TOKEN_DTYPES:
            raise ValueError(f"dtype {self.dtype!r}, must be {' or '.join(TOKEN_DTYPES)}")
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != (2 if name == "keys" else 1):
                raise ValueError(f"array {name} is {array.dtype} {list(array.shape)}")

    def check(self, shard: Path) -> None:
        """Refuse an index that was not made for this file: its size, documents outside it, over one another or not
        where a tar has them, and the tar headers of the first and the last document.
        """
        size = shard.stat().st_size
        cure = f"restore the shard, or remove {shard.name}{INDEX_SUFFIX} to have it built again"
        if size != self.shard_size:
            state = "truncated" if size < self.shard_size else "changed"
            raise ValueError(f"{shard}: {state}: {size} bytes, its index was made for {self.shard_size}; {cure}")
        self.check_places(shard, cure)
        with shard.open("rb") as file:
            for document in sorted({0, len(self.offsets) - 1} if len(self.offsets) else ()):
                self._check_header(document, file, shard, cure)

    def check_places(self, shard: Path | str, cure: str) -> None:
        """Refuse an index whose documents cannot lie in any tar of its size."""
        size = self.shard_size
        if len({len(self.offsets), len(self.lengths), len(self.text_bytes), len(self.keys)}) != 1:
            raise ValueError(f"{shard}: its index has arrays of different lengths; {cure}")
        outside = (self.offsets < BLOCK) | (self.offsets > size) | (self.lengths < 0) | (self.lengths > size)
        ends = self.offsets + self.lengths * np.dtype(self.dtype).itemsize
        bad = outside | (ends > size) | (self.offsets % BLOCK != 0)
        bad[1:] |= self.offsets[1:] < ends[:-1] + BLOCK
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{shard}: its index disagrees with it: document {first} at bytes {self.offsets[first]} to "
                f"{ends[first]} of {size}; {cure}"
            )

    def verify(self, shard: Path) -> None:
        """Refuse an index that was not made for this file, to the last bit: its sha256 too."""
        with shard.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            size = shard.stat().st_size
            raise ValueError(
                f"{size} bytes with sha256 {found[:12]}..., not {self.shard_size} with {self.sha256[:12]}..."
            )
        self.check(shard)

    def _check_header(self, document: int, file: IO[bytes], shard: Path, cure: str) -> None:
        offset, wanted = int(self.offsets[document]), self._key(document) + b".tokens"
        num_bytes = int(self.lengths[document]) * np.dtype(self.dtype).itemsize
        file.seek(offset - BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            name = member.name.encode(errors="surrogateescape")
            # Other names are only in an extended header before this one, in the tars of others.
            plain = len(wanted) <= 100 and wanted.isascii()
            fits = member.size == num_bytes and (not plain or name == wanted)
            found = f"{member.name!r} with {member.size} bytes"
        except tarfile.HeaderError:
            fits, found = False, "no member of the tar"
        if not fits:
            raise ValueError(
                f"{shard}: its index disagrees with it: document {document} is {self.key(document) + '.tokens'!r} "
                f"with {num_bytes} bytes at {offset}, there is {found}; {cure}"
            )


def make_index(rows: list[tuple[int, int, int]], keys: list[str], **facts: Any) -> ShardIndex:
    """An index from (offset, tokens, text bytes) rows."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    width = max([len(key) for key in encoded], default=0) or 1
    padded = np.frombuffer(b"".join(key.ljust(width, b"\0") for key in encoded), dtype=np.uint8)
    columns = [np.ascontiguousarray(column) for column in table.T]
    return ShardIndex(columns[0], columns[1], columns[2], padded.reshape(-1, width), **facts)


def find_key(keys: np.ndarray, key: str) -> np.ndarray:
    """Rows of ``keys`` uint8 [n, width], padded with zeros, that are ``key``."""
    wanted = key.encode(errors="surrogateescape")
    if len(wanted) > keys.shape[1]:
        return np.empty(0, np.int64)
    return np.flatnonzero((keys == np.frombuffer(wanted.ljust(keys.shape[1], b"\0"), np.uint8)).all(1))


def scan_shard(shard: Path, dtype: str, advance: Callable[[int], None] = lambda _: None) -> ShardIndex:
    """Build the index of a shard made elsewhere (webdataset's own writer, say) by reading it from end to end.

    ``advance`` is called with bytes done, now and then.
    """
    item = np.dtype(dtype).itemsize
    rows: dict[str, tuple[int, int]] = {}  # key -> offset, tokens
    text_bytes: dict[str, int] = {}
    max_token, done, others = 0, 0, set()
    with shard.open("rb") as file:
        check_end(shard, file)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing but file)
            for number, member in enumerate(archive, 1):
                if number % MEMBERS_AT_ONCE == 0:
                    advance(member.offset - done)
                    done = member.offset
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
    advance(shard.stat().st_size - done)
    if not rows:
        found = ", ".join(sorted(others)) or "nothing"
        raise ValueError(f"{shard}: holds no .tokens member (found: {found}); build token shards from the text first")
    table = [(*row, text_bytes.get(key, -1)) for key, row in rows.items()]
    facts = {"dtype": dtype, "shard_size": shard.stat().st_size, "sha256": sha256, "max_token": max_token}
    return make_index(table, list(rows), **facts)


def check_end(shard: Path, file: IO[bytes]) -> None:
    """Raise ValueError for a file that does not end as a tar does; leaves ``file`` at its start."""
    size = shard.stat().st_size
    file.seek(max(size - len(END_OF_ARCHIVE), 0))
    if size % BLOCK or file.read() != END_OF_ARCHIVE:
        raise ValueError(f"{shard}: truncated or not a tar: no end-of-archive mark; restore it or build it again")
    file.seek(0)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


def load_index(shard: Shard, dtype: str, advance: Callable[[int], None] = lambda _: None) -> ShardIndex:
    """The checked index of a shard; one without an index is scanned (``advance`` is told how far), and the result
    kept where it is looked for next time. Of a shard elsewhere, that fits its index is seen when it is fetched.
    """
    path = shard.beside(INDEX_SUFFIX)
    if not path.is_file():
        with shard.local() as file:
            index = scan_shard(file, dtype, advance)
            if os.access(path.parent, os.W_OK):
                index.save(path)
        return index
    index = ShardIndex.load(path)
    if shard.url:
        index.check_places(shard.name, f"index it again there, and remove {path}")
    else:
        index.check(shard.path)
    if index.dtype != dtype:
        raise ValueError(
            f"{shard.name}: holds {index.dtype} tokens, {dtype} is expected for this vocabulary; the shard belongs to "
            f"another tokenizer"
        )
    return index


def _text_bytes(blob: bytes) -> int:
    try:
        return int(json.loads(blob)["text_bytes"])
    except (ValueError, KeyError, TypeError):
        return -1

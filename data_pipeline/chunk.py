"""One chunk of a build: its pieces read, encoded and written as shards of both splits, in one process."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.shards import ShardWriter
from data_pipeline.sources.text import Document, Piece, Reject, read_piece
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

CHUNK_REPORT, CHUNK_REJECTS = "report.json", "rejects.jsonl"
SAMPLE_PLACES = 20
BATCH_LETTERS = 1 << 15  # text given to the tokenizer at a time: small, so that its results stay in the cache


@dataclass(frozen=True)
class ChunkJob:
    """All that a worker needs; plain values."""

    number: int
    pieces: tuple[Piece, ...]
    work: str
    tokenizer: str  # folder
    tokenizer_hash: str
    text_field: str
    shard_size: int  # text bytes
    seed: int
    held_out: float

    @property
    def folder(self) -> Path:
        """Where the finished chunk lies: whole or absent."""
        return Path(self.work) / f"chunk-{self.number:06d}"

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def start_worker() -> None:
    """One thread a worker, and no worker outlives a killed build."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build itself ends them, without their tracebacks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def encode_chunk(job: ChunkJob) -> int:
    """Write the chunk's folder: ``train-*.tar`` and ``heldout-*.tar``, rejects and counts. Returns bytes
    read.
    """
    partial = job.folder.with_name(f"{job.folder.name}-{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tokenizer = _tokenizer(job.tokenizer, job.tokenizer_hash)
    rejects: list[Reject] = []
    longest: tuple[int, str] = (0, "")
    ordinal = unknown = 0
    with ExitStack() as stack:
        splits = {
            name: stack.enter_context(_Split(partial, name, tokenizer.dtype, job.shard_size))
            for name in ("train", "heldout")
        }
        for documents in _batches(job, rejects):
            encoded = tokenizer.encode_batch([document.text for document in documents], end_of_text=True)
            for document, tokens in zip(documents, encoded, strict=True):
                split = "heldout" if is_held_out(document, job.seed, job.held_out) else "train"
                splits[split].add(f"{job.number:06d}{ordinal:08d}", document, tokens)
                ordinal += 1
                if tokenizer.unk_id is not None:
                    unknown += int(np.count_nonzero(tokens == tokenizer.unk_id))
                if len(tokens) > longest[0]:
                    longest = (len(tokens), document.source)
    report = {
        "splits": {name: split.counts for name, split in splits.items() if split.counts["shards"]},
        "rejects": Counter(reject.reason for reject in rejects),
        "lost_bytes": sum(reject.lost_bytes for reject in rejects),
        "unknown_tokens": unknown,
        "longest_document": {"tokens": longest[0], "source": longest[1]},
    }
    lines = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects]
    (partial / CHUNK_REJECTS).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    (partial / CHUNK_REPORT).write_text(json.dumps(report))
    partial.rename(job.folder)
    return job.num_bytes


class _Split:
    """The shards of one split of a chunk; a new one is begun when the open one is full."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_size: int) -> None:
        self.folder, self.name, self.dtype, self.shard_size = folder, name, dtype, shard_size
        self.counts = Counter({"shards": 0, "documents": 0, "tokens": 0, "text_bytes": 0})
        self._writer: ShardWriter | None = None
        self._filled = 0

    def add(self, key: str, document: Document, tokens: np.ndarray) -> None:
        text_bytes = len(document.text.encode())
        if self._writer is None or self._filled >= self.shard_size:
            self._close()
            path = self.folder / f"{self.name}-{self.counts['shards']:05d}.tar"
            self._writer, self._filled = ShardWriter(path, self.dtype), 0
            self.counts["shards"] += 1
        self._writer.add(key, tokens, {"source": document.source}, text_bytes=text_bytes)
        self._filled += text_bytes
        self.counts.update(documents=1, tokens=len(tokens), text_bytes=text_bytes)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()


def _batches(job: ChunkJob, rejects: list[Reject]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    letters = 0
    for piece in job.pieces:
        for entry in read_piece(piece, job.text_field):
            if isinstance(entry, Reject):
                rejects.append(entry)
                continue
            batch.append(entry)
            letters += len(entry.text)
            if letters >= BATCH_LETTERS:
                yield batch
                batch, letters = [], 0
    if batch:
        yield batch


def sample_texts(pieces: list[Piece], num_bytes: int, *, text_field: str, seed: int, held_out: float) -> list[str]:
    """Training documents, cut to ``num_bytes`` in all, from many places: pieces in hash order, a share from each."""
    texts: list[str] = []
    bad: list[Reject] = []
    left, share = num_bytes, num_bytes // min(SAMPLE_PLACES, len(pieces) or 1)
    for piece in sorted(pieces, key=lambda piece: unit_hash(seed, f"sample:{piece.name}:{piece.start}")):
        here = min(left, share)
        for entry in read_piece(piece, text_field):
            if here <= 0:
                break
            if isinstance(entry, Reject):
                bad.append(entry)
            elif not is_held_out(entry, seed, held_out):
                texts.append(entry.text[:here])
                size = len(texts[-1].encode())
                here, left = here - size, left - size
    if not texts:
        first = f"; the first bad record is {bad[0].source}: {bad[0].reason} {bad[0].detail}" if bad else ""
        raise ValueError(f"tokenizer: no training document in {len(pieces)} inputs to train it on{first}")
    return texts


def inputs_hash(pieces: list[Piece]) -> str:
    """Changes when an input is added, removed or rewritten (by size and modification time)."""
    times = {path: os.stat(path).st_mtime_ns for path in {piece.path for piece in pieces}}  # noqa: PTH116
    rows = [(piece.name, piece.start, piece.stop, times[piece.path]) for piece in pieces]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def is_held_out(document: Document, seed: int, share: float) -> bool:
    """Decided by a hash of the file's name, or of a record's text (equal records stay on one side)."""
    return share > 0 and unit_hash(seed, document.source if document.whole_file else document.text) < share


def unit_hash(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@lru_cache(maxsize=1)
def _tokenizer(folder: str, _: str) -> Tokenizer:
    """Kept over the chunks of a worker, for its cache of words; the hash keeps a rebuilt folder from being
    stale.
    """
    return load_tokenizer(folder)

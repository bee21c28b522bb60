"""What is wrong with one token shard, and what the checks over all shards need of it."""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.doctor.findings import Findings
from data_pipeline.doctor.indexes import compare_index, read_index
from data_pipeline.doctor.layout import Layout
from data_pipeline.doctor.minhash import Sketches, sketch
from data_pipeline.doctor.vocabulary import Vocabulary
from data_pipeline.index import make_index
from data_pipeline.places import Shard

TOKENS_AT_ONCE = 1 << 17  # fits the caches: several times as fast as a million
MIN_TOKENS = 64  # of a document whose entropy or share of unknown tokens is judged
UNKNOWN_SHARE = 0.2  # of a document
MOST_COUNTED = 1 << 18  # ids that are counted where the vocabulary's size is unknown


@dataclass(frozen=True)
class Limits:
    """most_tokens: of a document, longer ones are reported. most_sketches: kept for near duplicates."""

    most_tokens: int
    most_sketches: int


@dataclass
class TokenFacts:
    """Documents of a shard, n of them."""

    keys: np.ndarray  # bytes [n]
    lengths: np.ndarray  # int64 [n], tokens
    digests: np.ndarray  # uint64 [n], of the tokens
    entropies: np.ndarray  # float32 [n], nats a token; NaN for short documents
    counts: np.ndarray  # int64, of each token
    sketches: Sketches
    unknown: int  # tokens


def examine_tokens(
    source: Shard,
    path: Path,
    data: mmap.mmap,
    layout: Layout,
    vocabulary: Vocabulary,
    limits: Limits,
    findings: Findings,
) -> TokenFacts:
    """Check the documents of a shard, which lies in ``path`` and is mapped as ``data``, and its index."""
    index = read_index(source, findings)
    name = (index.dtype if index else vocabulary.dtype) or "uint16"
    if index and vocabulary.dtype and index.dtype != vocabulary.dtype:
        findings.add("dtype", f"holds {index.dtype}, its folder's vocabulary is of {vocabulary.dtype}", source.name)
    shard = _Shard(source.name, data, layout, name, vocabulary, findings)
    shard.check_lengths(limits.most_tokens)
    for begin, end in _batches(shard.lengths):
        shard.examine(begin, end, limits.most_sketches)
    shard.check_ends()
    text_bytes = shard.read_tables(layout)
    if index and not layout.torn:
        rows = list(zip(shard.offsets.tolist(), shard.lengths.tolist(), text_bytes, strict=True))
        keys = [key for key, _ in layout.tokens]
        facts = {"dtype": name, "shard_size": len(data), "sha256": "", "max_token": shard.largest}
        compare_index(source.name, path, data, index, make_index(rows, keys, **facts), findings)
    return shard.facts(limits.most_sketches)


@dataclass
class _Shard:
    name: str
    data: mmap.mmap
    layout: Layout
    dtype: str
    vocabulary: Vocabulary
    findings: Findings
    largest: int = 0
    unknown: int = 0
    without_end: list[int] = field(default_factory=list)  # documents
    sketches: list[Sketches] = field(default_factory=list)

    def __post_init__(self) -> None:
        documents, kind = self.layout.tokens, np.dtype(self.dtype).newbyteorder("<")
        self.view = np.frombuffer(self.data, kind, count=len(self.data) // kind.itemsize)
        self.keys = np.array([key.encode(errors="surrogateescape") for key, _ in documents])
        self.offsets = np.array([offset for _, (offset, _) in documents], np.int64)
        sizes = np.array([size for _, (_, size) in documents], np.int64)
        self.lengths, self.starts = sizes // kind.itemsize, self.offsets // kind.itemsize
        self.digests = np.zeros(len(documents), np.uint64)
        self.entropies = np.full(len(documents), np.nan, np.float32)
        self.counts = np.zeros(min(self.vocabulary.size or MOST_COUNTED, np.iinfo(kind).max + 1), np.int64)
        odd = np.flatnonzero(sizes % kind.itemsize)
        self.report("dtype", odd, lambda document: f"{sizes[document]} bytes are no whole number of {self.dtype}")

    def report(self, code: str, documents: Iterable[int], what: Callable[[int], str]) -> None:
        self.findings.add_all(code, self.name, documents, what, self.key)

    def key(self, document: int) -> str:
        return self.layout.tokens[document][0]

    def check_lengths(self, most: int) -> None:
        self.report("overlong", np.flatnonzero(self.lengths > most), lambda d: f"{self.lengths[d]:,} tokens")
        self.report("empty", np.flatnonzero(self.lengths == 0), lambda d: "holds no token")

    def examine(self, begin: int, end: int, most_sketches: int) -> None:
        """The documents from ``begin`` to before ``end``, those without a token left out."""
        documents = np.arange(begin, end)[self.lengths[begin:end] > 0]
        if not len(documents):
            return
        places = zip(self.starts[documents].tolist(), self.lengths[documents].tolist(), strict=True)
        parts = [self.view[start : start + length] for start, length in places]
        self.digests[documents] = [_digest(part) for part in parts]
        tokens, lengths = np.concatenate(parts), self.lengths[documents]
        largest = int(tokens.max())
        self.largest = max(self.largest, largest)
        begins = np.cumsum(lengths) - lengths
        self._check_ids(tokens, begins, documents, largest)
        self._check_special(tokens, begins, documents)
        self._measure(tokens, begins, documents, largest)
        self.sketches.append(sketch(tokens, lengths, documents))
        if sum(len(part.order) for part in self.sketches) > 2 * most_sketches:
            self.sketches = [Sketches.joined(self.sketches).smallest(most_sketches)]

    def _check_ids(self, tokens: np.ndarray, begins: np.ndarray, documents: np.ndarray, largest: int) -> None:
        size = self.vocabulary.size
        if size is not None and largest >= size:
            worst = np.maximum.reduceat(tokens, begins)
            bad = {int(documents[at]): int(worst[at]) for at in np.flatnonzero(worst >= size)}
            self.report("id-range", bad, lambda d: f"holds token {bad[d]}, the vocabulary has {size} ids")

    def _check_special(self, tokens: np.ndarray, begins: np.ndarray, documents: np.ndarray) -> None:
        vocabulary, lengths = self.vocabulary, self.lengths[documents]
        eos, pad = vocabulary.eos_id, vocabulary.pad_id
        if eos is not None:
            ended = tokens[begins + lengths - 1] == eos
            self.without_end += documents[~ended].tolist()
            mask = tokens == eos
            mask[begins + lengths - 1] = False
            inner = dict(_occurrences(mask, begins, documents))
            self.report("inner-end-of-text", inner, lambda d: f"holds the end of text {inner[d]} times before its end")
            self.report("empty", documents[ended & (lengths == 1)], lambda d: "holds the end of text alone")
        if pad is not None and pad not in (eos, vocabulary.unk_id):
            pads = dict(_occurrences(tokens == pad, begins, documents))
            self.report("padding-inside", pads, lambda d: f"holds the padding token {pad} {pads[d]} times")
        if vocabulary.unk_id is not None:
            unknown = dict(_occurrences(tokens == vocabulary.unk_id, begins, documents))
            self.unknown += sum(unknown.values())
            share = {d: number / int(self.lengths[d]) for d, number in unknown.items()}
            bad = [d for d in share if share[d] > UNKNOWN_SHARE and self.lengths[d] >= MIN_TOKENS]
            self.report("unknown-share", bad, lambda d: f"{share[d]:.0%} of its tokens are unknown")

    def _measure(self, tokens: np.ndarray, begins: np.ndarray, documents: np.ndarray, largest: int) -> None:
        """Entropy of each document and counts of tokens, from (document, token) sorted and counted."""
        lengths, size = self.lengths[documents], largest + 1
        kind: Any = np.uint32 if len(documents) * size < 1 << 32 else np.uint64
        pairs = np.repeat(np.arange(0, len(documents) * size, size, dtype=kind), lengths)
        pairs += tokens
        pairs.sort()
        runs = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        numbers = np.diff(np.append(runs, len(pairs)))
        ids = (pairs[runs] % kind(size)).astype(np.int64)
        inside = ids < len(self.counts)
        # Sums of whole numbers in float64: exact.
        self.counts += np.bincount(ids[inside], numbers[inside], minlength=len(self.counts)).astype(np.int64)
        # A document begins where a run does, since its number is the pairs' leading part.
        sums = np.add.reduceat(numbers * np.log(numbers), np.searchsorted(runs, begins))
        entropies = np.log(lengths) - sums / lengths
        long = lengths >= MIN_TOKENS
        self.entropies[documents[long]] = entropies[long]

    def check_ends(self) -> None:
        number, eos = len(self.without_end), self.vocabulary.eos_id
        if number > 1 and 2 * number > len(self.keys):
            what = f"{number} of {len(self.keys)} documents do not end with token {eos}"
            self.findings.add("no-end-of-text", what, self.name)
        else:
            self.report("no-end-of-text", self.without_end, lambda d: f"does not end with token {eos}")

    def read_tables(self, layout: Layout) -> list[int]:
        """Text bytes of each document as its .json tells, -1 where it does not; wrong ones are reported."""
        text_bytes = []
        for (key, _), length in zip(layout.tokens, self.lengths.tolist(), strict=True):
            offset, size = layout.tables.get(key, (0, 0))
            about = _table(self.data[offset : offset + size]) if size else {}
            if about is None:
                self.findings.add("facts-disagree", "its .json is no table", self.name, key)
                about = {}
            told = about.get("num_tokens", length)
            if told != length:
                self.findings.add("facts-disagree", f"its .json tells of {told} tokens, not {length}", self.name, key)
            number = about.get("text_bytes", -1)
            text_bytes.append(number if type(number) is int else -1)
        return text_bytes

    def facts(self, most_sketches: int) -> TokenFacts:
        sketches = Sketches.joined(self.sketches).smallest(most_sketches)
        return TokenFacts(self.keys, self.lengths, self.digests, self.entropies, self.counts, sketches, self.unknown)


def _batches(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents with about TOKENS_AT_ONCE tokens together, at least one document each."""
    ends, begin = np.cumsum(lengths), 0
    while begin < len(lengths):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + TOKENS_AT_ONCE, side="right")))
        yield begin, end
        begin = end


def _digest(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(tokens.data).digest()[:8], "little")


def _occurrences(mask: np.ndarray, begins: np.ndarray, documents: np.ndarray) -> Iterator[tuple[int, int]]:
    """Documents in which a mask is set, and how often."""
    places = np.flatnonzero(mask)
    owners, numbers = np.unique(np.searchsorted(begins, places, side="right") - 1, return_counts=True)
    return zip(documents[owners].tolist(), numbers.tolist(), strict=True)


def _table(blob: bytes) -> dict | None:
    try:
        about = json.loads(blob)
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None

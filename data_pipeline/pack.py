"""Documents as an endless stream of packed training samples, a pure function of (seed, global sample index).

    epoch e:   documents in the order of (seed, e), end to end:   aaaa|bbbbbbb|cc|ddddd...   T tokens
    pieces:    cut every S tokens; the last one runs on into the epoch's first document
    sample i:  epoch i // n, piece permuted(i % n) of its n: neighbours in a batch come from all over the corpus

Finding a sample is a few hashes and one binary search in the epoch's cumulative lengths: nothing is scanned,
nothing is remembered.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.ahead import Ahead
from data_pipeline.reader import TokenDataset

PIECES_AT_ONCE = 4096  # places of the sample permutation computed together
IGNORED = -100  # target of a position that no loss is taken at, as torch's cross_entropy has it


class Samples(NamedTuple):
    """Packed samples: B of them, S tokens each, in fresh int32 arrays."""

    tokens: np.ndarray  # [B, S + 1]
    targets: np.ndarray  # [B, S]; the next token, IGNORED at the last token of a document
    positions: np.ndarray  # [B, S]; 0 at each document's start and at the row's start
    documents: np.ndarray  # [B, S]; 0, 1, 2, ... along the row


class ImageSamples(NamedTuple):
    """Samples with pictures: B of them, S tokens and P patches each. A patch has D = 3 * side**2 values."""

    tokens: np.ndarray  # [B, S + 1] int32; an image token at each place of a picture
    targets: np.ndarray  # [B, S] int32; as in `Samples`, IGNORED also where an image token would come next
    positions: np.ndarray  # [B, S] int32
    documents: np.ndarray  # [B, S] int32; -1 for padding
    slots: np.ndarray  # [B, S] int32; place in [0, P) of the first patch that an image token stands for, -1 for text
    spans: np.ndarray  # [B, S] int32; number in the row of the picture that a token belongs to, -1 for text
    patches: np.ndarray  # [B, P, D] uint8; as (channel, y, x), RGB, 0 to 255
    images: np.ndarray  # [B, P] int32; number in the row of the picture that a patch is of, -1 for padding
    grid: np.ndarray  # [B, P, 2] int32; row and column in the picture, (-1, -1) for a class token's place


class Entries(NamedTuple):
    """Which documents lie in some samples: one entry a document and sample, in the order that they have there."""

    rows: np.ndarray  # int64 [n], of the samples asked for
    documents: np.ndarray  # int64 [n], numbers in the dataset
    offsets: np.ndarray  # int64 [n], the document's first token that is there


class SampleStream(Protocol):
    """What the loader needs; a mixture of streams is one as well."""

    @property
    def seq_len(self) -> int: ...

    def read(self, start: int, count: int) -> Samples | ImageSamples: ...


class SourceStream(SampleStream, Protocol):
    """A stream of one source, which knows what its samples are made of."""

    def documents(self, start: int, count: int) -> Entries: ...


class Pieces(NamedTuple):
    """Parts of documents in samples of S + 1 tokens, [n] each, by ascending row and column."""

    rows: np.ndarray
    columns: np.ndarray  # where the part begins in its row
    documents: np.ndarray
    offsets: np.ndarray  # of the part in its document
    lengths: np.ndarray  # tokens


class TokenStream:
    """The packed samples of a dataset; sample ``i`` depends on (seed, i) and the dataset alone.

    Args:
        seq_len: S, tokens of a sample.
        shuffle: permute documents and samples anew each epoch; else their order is the dataset's.
        together: shards whose documents are shuffled among themselves, in an order of shards that is shuffled too; what
            is read at one time then lies in few shards. 0: all.
        skipped: numbers of documents that are left out: they stay where they are, and nothing in them is a target.

    Attributes:
        num_samples: n, samples of one epoch. Each token is a target once, or twice in the last sample's overhang.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        together: int = 0,
        skipped: Sequence[int] = (),
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: must be at least 1")
        self.dataset, self.seq_len, self.seed, self.shuffle = dataset, seq_len, seed, shuffle
        self.num_samples = max(1, -(-(dataset.num_tokens - 1) // seq_len))
        num_shards = len(dataset.paths)
        self._together = together if 0 < together < num_shards else num_shards
        # Samples that are shuffled among themselves: as many as those shards have.
        self._window = max(1, self.num_samples * self._together // num_shards)
        self._skipped = np.array(sorted(skipped), np.int64)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pieces: dict[tuple[int, int], np.ndarray] = {}
        self._ahead = Ahead(self.pieces)

    def read(self, start: int, count: int) -> Samples:
        """Samples ``start`` to ``start + count - 1`` of the stream."""
        pieces = self._ahead(start, count)
        return pack(pieces, self.views(pieces), count, self.seq_len, self.skips(pieces))

    def documents(self, start: int, count: int) -> Entries:
        """Which documents lie in samples ``start`` to ``start + count - 1``; nothing is read."""
        pieces = self.pieces(start, count)
        inside = pieces.columns < self.seq_len  # else it is only the last target of its row, which is ignored
        return Entries(pieces.rows[inside], pieces.documents[inside], pieces.offsets[inside])

    def pieces(self, start: int, count: int) -> Pieces:
        """What samples ``start`` to ``start + count - 1`` are made of; each row begins with a piece."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        done, width, found = 0, self.seq_len + 1, []
        while done < count:
            epoch, first = divmod(start + done, self.num_samples)
            some = min(count - done, self.num_samples - first)
            order, ends = self._epoch(epoch)
            offsets = self._shuffled(epoch, first, some) * self.seq_len
            low = np.searchsorted(ends, offsets, side="right")
            spans = np.searchsorted(ends, offsets + (width - 1), side="right") - low + 1
            rows = np.repeat(np.arange(some), spans)
            places = np.arange(len(rows)) + (low - np.cumsum(spans) + spans)[rows]
            documents = order[places]
            begins = ends[places] - self.dataset.lengths[documents]
            inner = np.maximum(begins, offsets[rows])
            lengths = np.minimum(ends[places], offsets[rows] + width) - inner
            held = lengths > 0
            pieces = Pieces(rows + done, inner - offsets[rows], documents, inner - begins, lengths)
            found.append(pieces if held.all() else Pieces(*(column[held] for column in pieces)))
            done += some
        return found[0] if len(found) == 1 else Pieces(*map(np.concatenate, zip(*found, strict=True)))

    def views(self, pieces: Pieces) -> list[np.ndarray]:
        """The tokens of each piece."""
        return self.dataset.views(pieces.documents, pieces.offsets, pieces.lengths)

    def skips(self, pieces: Pieces) -> np.ndarray:
        """Whether a piece is of a document that is left out, bool [n]."""
        return np.isin(pieces.documents, self._skipped) if len(self._skipped) else np.zeros(len(pieces.rows), bool)

    def _shuffled(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Pieces of the epoch that its samples ``first`` to ``first + count - 1`` are."""
        if not self.shuffle:
            return np.arange(first, first + count)
        wanted = range(first // PIECES_AT_ONCE, (first + count - 1) // PIECES_AT_ONCE + 1)
        known = self._pieces  # another thread may replace it meanwhile
        parts = {(epoch, p): known[epoch, p] if (epoch, p) in known else self._part(epoch, p) for p in wanted}
        self._pieces = parts
        pieces = np.concatenate([*parts.values()])
        return pieces[first - wanted.start * PIECES_AT_ONCE :][:count]

    def _part(self, epoch: int, part: int) -> np.ndarray:
        """Pieces that so many samples of the epoch are; each is permuted inside its window."""
        end = min((part + 1) * PIECES_AT_ONCE, self.num_samples)
        pieces = np.arange(part * PIECES_AT_ONCE, end)
        num_windows = -(-self.num_samples // self._window)
        for window in range(int(pieces[0]) // self._window, (end - 1) // self._window + 1):
            begin = window * self._window
            own = (pieces >= begin) & (pieces < begin + self._window)
            size = min(self._window, self.num_samples - begin)
            # Where a window is the whole epoch, this is (seed, epoch).
            pieces[own] = begin + permuted(pieces[own] - begin, size, self.seed, epoch * num_windows + window)
        return pieces

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, and where each ends in its tokens: a cache, not a state.

        The first documents come again at the end, as far as the last sample reaches.
        """
        cached = self._epochs.get(epoch)
        if cached is None:
            count = self.dataset.num_documents
            order = self._order(epoch, count)
            ends = np.cumsum(self.dataset.lengths[order])
            whole, rest = divmod(self.num_samples * self.seq_len + 1 - self.dataset.num_tokens, self.dataset.num_tokens)
            order = np.resize(order, (whole + 1) * count + int(np.searchsorted(ends, rest)) + 1)
            cached = order, np.cumsum(self.dataset.lengths[order])
            kept = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: cached}
        return cached

    def _order(self, epoch: int, count: int) -> np.ndarray:
        """The epoch's documents, each once."""
        documents, shards = np.arange(count), len(self.dataset.paths)
        if not self.shuffle:
            return documents
        if self._together == shards:  # whatever shard each is in
            return permutation(count, self.seed, epoch)
        return np.concatenate(shuffled(self.dataset.shards_of(documents), shards, self._together, self.seed, epoch))


def pack(pieces: Pieces, views: list[np.ndarray], count: int, seq_len: int, skipped: np.ndarray) -> Samples:
    """B = ``count`` samples of S = ``seq_len`` tokens out of their pieces, by ascending row and column.

    views: tokens of each piece. skipped: bool [n], pieces that are no targets.
    """
    size = count * seq_len
    # One block for all: several large ones are returned to the system and faulted in again, at 5 times the cost.
    block = np.empty(4 * size + count, np.int32)
    tokens = block[: size + count].reshape(count, seq_len + 1)
    targets, positions, documents = block[size + count :].reshape(3, size)
    np.concatenate(views, out=tokens.reshape(-1))
    rows, columns = pieces.rows, pieces.columns
    targets.reshape(count, seq_len)[:] = tokens[:, 1:]
    later = columns > 0
    targets[rows[later] * seq_len + columns[later] - 1] = IGNORED
    for place in np.flatnonzero(skipped).tolist():
        begin, length = int(columns[place]), int(pieces.lengths[place])
        targets.reshape(count, seq_len)[rows[place], begin : begin + length] = IGNORED

    inside = columns < seq_len
    rows, columns = rows[inside], columns[inside]
    bounds = rows * seq_len + columns
    lengths = np.diff(bounds, append=size)
    ordinals = np.arange(len(rows)) - np.flatnonzero(columns == 0)[rows]
    documents[:] = np.repeat(ordinals.astype(np.int32), lengths)
    np.subtract(np.arange(size, dtype=np.int32), np.repeat(bounds.astype(np.int32), lengths), out=positions)
    shape = (count, seq_len)
    return Samples(tokens, targets.reshape(shape), positions.reshape(shape), documents.reshape(shape))


def permuted(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) takes each ``index`` [k] int64; no table of it is made.

    A Feistel network over the next even number of bits; what lands outside walks on until it is inside (Black &
    Rogaway 2002).
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    low, shift = np.uint64((1 << half) - 1), np.uint64(half)
    value, outside = index.astype(np.uint64), np.ones(len(index), bool)
    with np.errstate(over="ignore"):
        keys = [_salt(seed, epoch) + np.uint64(number) for number in range(1, 5)]
        while outside.any():
            left, right = value[outside] >> shift, value[outside] & low
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & low)
            value[outside] = (left << shift) | right
            outside = value >= np.uint64(size)
    return value.astype(np.int64)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), int64: documents sorted by a hash of (seed, epoch, document).

    numpy promises no stable stream for its own shuffles across versions; resumes need one.
    """
    with np.errstate(over="ignore"):
        return np.argsort(_mix(np.arange(size, dtype=np.uint64) + _salt(seed, epoch)), kind="stable")


def shuffled(shards: np.ndarray, num_shards: int, together: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The numbers of samples whose ``shards`` [n] are given, in another order: those of ``together`` shards, those of
    the next ones, in an order of shards that is shuffled too. 0: of all.
    """
    order = permutation(len(shards), seed, epoch)
    if not 0 < together < num_shards:
        return [order]
    groups = np.empty(num_shards, np.int64)
    groups[permutation(num_shards, seed, epoch)] = np.arange(num_shards) // together
    order = order[np.argsort(groups[shards[order]], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[shards[order]])) + 1)


def _salt(seed: int, epoch: int) -> np.uint64:
    with np.errstate(over="ignore"):
        return np.uint64(_mix(_mix(np.uint64(seed % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch)))


def _mix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

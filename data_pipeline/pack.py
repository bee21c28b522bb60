"""Documents as an endless stream of packed training samples, a pure function of (seed, global sample index).

    epoch e:   documents in the order of (seed, e), end to end:   aaaa|bbbbbbb|cc|ddddd...   T tokens
    pieces:    cut every S tokens; the last one runs on into the epoch's first document
    sample i:  epoch i // n, piece permuted(i % n) of its n: neighbours in a batch come from all over the corpus

Finding a sample is a few hashes and one binary search in the epoch's cumulative lengths: nothing is scanned,
nothing is remembered.
"""

from typing import NamedTuple, Protocol

import numpy as np

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


class SampleStream(Protocol):
    """What the loader needs; a mixture of streams is one as well."""

    @property
    def seq_len(self) -> int: ...

    def read(self, start: int, count: int) -> Samples | ImageSamples: ...


class TokenStream:
    """The packed samples of a dataset; sample ``i`` depends on (seed, i) and the dataset alone.

    Args:
        seq_len: S, tokens of a sample.
        shuffle: permute documents and samples anew each epoch; else their order is the dataset's.

    Attributes:
        num_samples: n, samples of one epoch. Each token is a target once, or twice in the last sample's overhang.
    """

    def __init__(self, dataset: TokenDataset, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: must be at least 1")
        self.dataset, self.seq_len, self.seed, self.shuffle = dataset, seq_len, seed, shuffle
        self.num_samples = max(1, -(-(dataset.num_tokens - 1) // seq_len))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pieces: dict[tuple[int, int], np.ndarray] = {}

    def read(self, start: int, count: int) -> Samples:
        """Samples ``start`` to ``start + count - 1`` of the stream."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        seq_len, size = self.seq_len, count * self.seq_len
        # One block for all: several large ones are returned to the system and faulted in again, at 5 times the cost.
        block = np.empty(4 * size + count, np.int32)
        tokens = block[: size + count].reshape(count, seq_len + 1)
        targets, positions, documents = block[size + count :].reshape(3, size)
        rows, columns = self._fill(start, tokens)
        targets.reshape(count, seq_len)[:] = tokens[:, 1:]
        later = columns > 0
        targets[rows[later] * seq_len + columns[later] - 1] = IGNORED

        inside = columns < seq_len
        rows, columns = rows[inside], columns[inside]
        bounds = rows * seq_len + columns
        lengths = np.diff(bounds, append=size)
        ordinals = np.arange(len(rows)) - np.flatnonzero(columns == 0)[rows]
        documents[:] = np.repeat(ordinals.astype(np.int32), lengths)
        np.subtract(np.arange(size, dtype=np.int32), np.repeat(bounds.astype(np.int32), lengths), out=positions)
        shape = (count, seq_len)
        return Samples(tokens, targets.reshape(shape), positions.reshape(shape), documents.reshape(shape))

    def _fill(self, start: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write the samples from ``start`` on into ``tokens`` [B, S + 1]; returns where their pieces of documents
        begin, as rows and columns in ascending order; each row begins with one.
        """
        done, width, found = 0, tokens.shape[1], []
        while done < len(tokens):
            epoch, first = divmod(start + done, self.num_samples)
            count = min(len(tokens) - done, self.num_samples - first)
            order, ends = self._epoch(epoch)
            offsets = self._shuffled(epoch, first, count) * self.seq_len
            low = np.searchsorted(ends, offsets, side="right")
            spans = np.searchsorted(ends, offsets + (width - 1), side="right") - low + 1
            rows = np.repeat(np.arange(count), spans)
            places = np.arange(len(rows)) + (low - np.cumsum(spans) + spans)[rows]
            documents = order[places]
            begins = ends[places] - self.dataset.lengths[documents]
            inner = np.maximum(begins, offsets[rows])
            lengths = np.minimum(ends[places], offsets[rows] + width) - inner
            self.dataset.gather(documents, inner - begins, lengths, tokens[done : done + count].reshape(-1))
            held = lengths > 0
            found.append((rows[held] + done, (inner - offsets[rows])[held]))
            done += count
        return np.concatenate([rows for rows, _ in found]), np.concatenate([columns for _, columns in found])

    def _shuffled(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Pieces of the epoch that its samples ``first`` to ``first + count - 1`` are."""
        if not self.shuffle:
            return np.arange(first, first + count)
        wanted = range(first // PIECES_AT_ONCE, (first + count - 1) // PIECES_AT_ONCE + 1)
        self._pieces = {
            (epoch, part): self._pieces[epoch, part]
            if (epoch, part) in self._pieces
            else permuted(
                np.arange(part * PIECES_AT_ONCE, min((part + 1) * PIECES_AT_ONCE, self.num_samples)),
                self.num_samples,
                self.seed,
                epoch,
            )
            for part in wanted
        }
        pieces = np.concatenate([self._pieces[epoch, part] for part in wanted])
        return pieces[first - wanted.start * PIECES_AT_ONCE :][:count]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, and where each ends in its tokens: a cache, not a state.

        The first documents come again at the end, as far as the last sample reaches.
        """
        cached = self._epochs.get(epoch)
        if cached is None:
            count = self.dataset.num_documents
            order = permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)
            ends = np.cumsum(self.dataset.lengths[order])
            whole, rest = divmod(self.num_samples * self.seq_len + 1 - self.dataset.num_tokens, self.dataset.num_tokens)
            order = np.resize(order, (whole + 1) * count + int(np.searchsorted(ends, rest)) + 1)
            cached = order, np.cumsum(self.dataset.lengths[order])
            kept = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: cached}
        return cached


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


def _salt(seed: int, epoch: int) -> np.uint64:
    with np.errstate(over="ignore"):
        return np.uint64(_mix(_mix(np.uint64(seed % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch)))


def _mix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

"""Documents as an endless stream of packed training samples, a pure function of (seed, global sample index).

    epoch e:   documents in the order of (seed, e), end to end:   aaaa|bbbbbbb|cc|ddddd...   T tokens
    stream:    epoch 0, epoch 1, ... for ever
    sample i:  stream tokens i*S to i*S + S (one more than S: the last one is only a target)

Finding a sample is one binary search in the epoch's cumulative lengths: nothing is scanned, nothing is
remembered.
"""

from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.reader import TokenDataset

IGNORED = -100  # target of a position that no loss is taken at, as torch's cross_entropy has it


class Samples(NamedTuple):
    """Packed samples: B of them, S tokens each. All arrays are fresh, but ``tokens`` rows overlap by their
    last token.
    """

    tokens: np.ndarray  # int64 [B, S + 1]
    targets: np.ndarray  # int64 [B, S]; the next token, IGNORED at the last token of a document
    positions: np.ndarray  # int32 [B, S]; 0 at each document's start and at the row's start
    documents: np.ndarray  # int32 [B, S]; 0, 1, 2, ... along the row


class SampleStream(Protocol):
    """What the loader needs; a mixture of streams is one as well."""

    @property
    def seq_len(self) -> int: ...

    def read(self, start: int, count: int) -> Samples: ...


class TokenStream:
    """The packed samples of a dataset; sample ``i`` depends on (seed, i) and the dataset alone.

    Args:
        seq_len: S, tokens of a sample.
        shuffle: permute the documents anew each epoch; else their order is the dataset's.
    """

    def __init__(self, dataset: TokenDataset, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: must be at least 1")
        self.dataset, self.seq_len, self.seed, self.shuffle = dataset, seq_len, seed, shuffle
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, the last one (partly from the next epoch) counted."""
        return -(-(self.dataset.num_tokens - 1) // self.seq_len)

    def read(self, start: int, count: int) -> Samples:
        """Samples ``start`` to ``start + count - 1`` of the stream."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        size, seq_len = count * self.seq_len, self.seq_len
        # One block for all: several large ones are returned to the system and faulted in again, at 5 times the cost.
        block = np.empty(3 * size + 1, np.int64)
        flat, targets = block[: size + 1], block[size + 1 : 2 * size + 1]
        positions, documents = block[2 * size + 1 :].view(np.int32).reshape(2, size)
        starts = self._fill(start * seq_len, flat)
        targets[:] = flat[1:]
        targets[starts[starts > 0] - 1] = IGNORED

        rows = np.arange(0, size, seq_len)
        bounds = np.union1d(rows, starts[starts < size])
        lengths = np.diff(bounds, append=size)
        ordinals = np.arange(len(bounds)) - np.searchsorted(bounds, rows)[bounds // seq_len]
        documents[:] = np.repeat(ordinals.astype(np.int32), lengths)
        np.subtract(np.arange(size, dtype=np.int32), np.repeat(bounds.astype(np.int32), lengths), out=positions)

        step = flat.strides[0]
        tokens = np.lib.stride_tricks.as_strided(flat, (count, seq_len + 1), (seq_len * step, step))
        shape = (count, seq_len)
        return Samples(tokens, targets.reshape(shape), positions.reshape(shape), documents.reshape(shape))

    def _fill(self, first: int, flat: np.ndarray) -> np.ndarray:
        """Write the stream's tokens from ``first`` on; returns where in ``flat`` a document starts."""
        num_tokens, done, starts = self.dataset.num_tokens, 0, []
        while done < len(flat):
            epoch, offset = divmod(first + done, num_tokens)
            stop = min(offset + len(flat) - done, num_tokens)
            order, ends = self._epoch(epoch)
            low, high = np.searchsorted(ends, [offset, stop - 1], side="right")
            documents = order[low : high + 1]
            begins = ends[low : high + 1] - self.dataset.lengths[documents]
            inner = np.maximum(begins, offset)
            lengths = np.minimum(ends[low : high + 1], stop) - inner
            self.dataset.gather(documents, inner - begins, lengths, flat[done : done + stop - offset])
            starts.append((begins - offset + done)[(begins >= offset) & (lengths > 0)])
            done += stop - offset
        return np.concatenate(starts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, and where each ends in its tokens: a cache, not a state."""
        cached = self._epochs.get(epoch)
        if cached is None:
            count = self.dataset.num_documents
            order = permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)
            cached = order, np.cumsum(self.dataset.lengths[order])
            kept = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: cached}
        return cached


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), int64: documents sorted by a hash of (seed, epoch, document).

    numpy promises no stable stream for its own shuffles across versions; resumes need one.
    """
    with np.errstate(over="ignore"):
        salt = _mix(_mix(np.uint64(seed % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch))
        return np.argsort(_mix(np.arange(size, dtype=np.uint64) + salt), kind="stable")


def _mix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

"""Packed samples made from a seed, for checks that need awkward documents and no files."""

import numpy as np

from data_pipeline.pack import IGNORED, Samples


class SyntheticStream:
    """A `SampleStream`; sample ``i`` depends on (seed, i) alone. Its documents are those that break layouts.

    By i modulo 4: one document over the whole row; single tokens, and one document that crosses every cut; documents
    that end at cuts into 2, 4 and 8 parts; documents of random lengths, the last cut off by the end of the row.
    """

    def __init__(self, *, seq_len: int, vocab_size: int, seed: int = 0) -> None:
        self.seq_len, self.vocab_size, self.seed = seq_len, vocab_size, seed

    def read(self, start: int, count: int) -> Samples:
        """Samples ``start`` to ``start + count - 1``."""
        rows = [self._row(index) for index in range(start, start + count)]
        return Samples(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        length = self.seq_len
        draw = np.random.default_rng((self.seed, index))
        # Squared, so that some tokens come often and some never.
        tokens = (draw.random(length + 1) ** 2 * self.vocab_size).astype(np.int32)
        begins = self._begins(index, draw)
        first = np.zeros(length + 1, bool)
        first[begins[begins <= length]] = True
        documents = np.cumsum(first, dtype=np.int32) - 1
        starts = np.flatnonzero(first)
        positions = np.arange(length + 1, dtype=np.int32) - starts[documents].astype(np.int32)
        targets = np.where(first[1:], IGNORED, tokens[1:]).astype(np.int32)
        return tokens, targets, positions[:length], documents[:length]

    def _begins(self, index: int, draw: np.random.Generator) -> np.ndarray:
        """Where documents begin in the row, 0 among them."""
        length = self.seq_len
        kind = index % 4
        if kind == 0:
            return np.array([0])
        if kind == 1:
            return np.array([0, 1, 2, min(5, length), max(length - 3, 0), length - 1])
        if kind == 2:
            return np.array([0, length // 8, length // 4, length // 2, length])
        return np.concatenate([[0], np.cumsum(draw.geometric(6 / length, size=length))])

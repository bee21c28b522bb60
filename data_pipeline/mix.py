"""Several sample streams as one, mixed by weight: global sample i -> (source, its own index), a pure function.

    block:  1024 samples; so many of each source that after b blocks none is a whole sample off its share
    inside: the sources' samples in an order permuted by (seed, block); each source is read on from where it was

Nothing is remembered: the cursor alone resumes exactly, at any place.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipeline.pack import ImageSamples, Samples, SampleStream, permuted

BLOCK = 1024  # samples, or more where a weight is so small that it would have less than 2 of them


@runtime_checkable
class PictureStream(Protocol):
    """A stream of `ImageSamples`. patch_shape: P and D."""

    @property
    def patch_shape(self) -> tuple[int, int]: ...


class MixedStream:
    """A `SampleStream` made of others.

    Rows of a source without pictures get empty image arrays where another source has pictures.

    Args:
        sources: streams and their weights, shares of the samples after division by their sum.

    Raises:
        ValueError: no source, a weight of 0 or less, or sources whose samples differ in S, P or D.
    """

    def __init__(self, sources: Sequence[tuple[SampleStream, float]], seed: int = 0) -> None:
        if not sources:
            raise ValueError("mixture: no source; name at least one")
        self.streams, self.seed = [stream for stream, _ in sources], seed
        weights = [weight for _, weight in sources]
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"mixture: weights {weights}: each must be a number above 0; leave a source out instead")
        lengths = [stream.seq_len for stream in self.streams]
        if len(set(lengths)) > 1:
            raise ValueError(f"mixture: sources with samples of {lengths} tokens; give all the same seq_len")
        shapes = {stream.patch_shape for stream in self.streams if isinstance(stream, PictureStream)}
        if len(shapes) > 1:
            raise ValueError(f"mixture: sources with different patches and values of a patch {sorted(shapes)}")
        self._patch_shape = next(iter(shapes), None)
        self.seq_len = lengths[0]
        total = sum(map(Fraction, weights))
        self._ends = np.cumsum([Fraction(weight) / total for weight in weights]).tolist()
        self._block = max(BLOCK, int(2 * total / Fraction(min(weights))) + 1)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def where(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and index in it of samples ``start`` to ``start + count - 1``, both int64 [count]."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        first, last = start // self._block, (start + count - 1) // self._block
        kept = {block: found for block, found in self._blocks.items() if first <= block <= last}
        self._blocks = {block: kept.get(block) or self._table(block) for block in range(first, last + 1)}
        tables = zip(*self._blocks.values(), strict=True)
        sources, indices = (np.concatenate(parts)[start - first * self._block :][:count] for parts in tables)
        return sources, indices

    def _before(self, block: int) -> np.ndarray:
        """Samples of each source in the blocks before this one: rounded down at each end, so they sum up."""
        return np.diff([0, *(int(block * self._block * end) for end in self._ends)])

    def _table(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._before(block), self._before(block + 1)
        places = permuted(np.arange(self._block), self._block, self.seed, block)
        sources = np.searchsorted(np.cumsum(after - before), places, side="right")
        indices = np.empty(self._block, np.int64)
        for source, begin in enumerate(before):
            own = sources == source
            indices[own] = begin + np.arange(own.sum())
        return sources, indices

    def read(self, start: int, count: int) -> Samples | ImageSamples:
        """Samples ``start`` to ``start + count - 1`` of the mixture."""
        sources, indices = self.where(start, count)
        mixed: Samples | ImageSamples | None = None
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)  # their indices follow one another
            samples = self._widened(self.streams[source].read(int(indices[rows[0]]), len(rows)))
            if len(rows) == count:
                return samples
            if mixed is None:
                mixed = type(samples)(*(np.empty((count, *array.shape[1:]), array.dtype) for array in samples))
            for array, own in zip(mixed, samples, strict=True):
                array[rows] = own
        assert mixed is not None
        return mixed

    def _widened(self, samples: Samples | ImageSamples) -> Samples | ImageSamples:
        """With empty image arrays, where other sources have pictures and this one has none."""
        if self._patch_shape is None or isinstance(samples, ImageSamples):
            return samples
        count, (patches, values) = len(samples.tokens), self._patch_shape
        return ImageSamples(
            *samples,
            slots=np.full_like(samples.targets, -1),
            spans=np.full_like(samples.targets, -1),
            patches=np.zeros((count, patches, values), np.uint8),
            images=np.full((count, patches), -1, np.int32),
            grid=np.zeros((count, patches, 2), np.int32),
        )

"""Several sample streams as one, each read at its share: global sample i -> (source, its own index), a pure function.

Nothing is remembered: the cursor and the mixture's history (timeline.py) resume exactly, at any place.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipeline.ledger import Record
from data_pipeline.pack import ImageSamples, Samples, SourceStream
from data_pipeline.timeline import Timeline


@runtime_checkable
class PictureStream(Protocol):
    """A stream of `ImageSamples`. patch_shape: P and D."""

    @property
    def patch_shape(self) -> tuple[int, int]: ...


class MixedStream:
    """A `SampleStream` made of others.

    Rows of a source without pictures get empty image arrays where another source has pictures.

    Args:
        streams: by name of the source; at least those of the timeline's latest phase.
        timeline: which sample is of which source.

    Raises:
        ValueError: sources whose samples differ in S, P or D.
    """

    def __init__(self, streams: Mapping[str, SourceStream], timeline: Timeline) -> None:
        self.streams, self.timeline = streams, timeline
        lengths = [stream.seq_len for stream in streams.values()]
        if len(set(lengths)) > 1:
            raise ValueError(f"mixture: sources with samples of {lengths} tokens; give all the same seq_len")
        shapes = {stream.patch_shape for stream in streams.values() if isinstance(stream, PictureStream)}
        if len(shapes) > 1:
            raise ValueError(f"mixture: sources with different patches and values of a patch {sorted(shapes)}")
        self._patch_shape = next(iter(shapes), None)
        self.seq_len = lengths[0]

    def _stream(self, number: int) -> SourceStream:
        name = self.timeline.names[number]
        if name not in self.streams:
            raise ValueError(f"source {name!r} is no longer in the mixture; name it in data.sources to read it again")
        return self.streams[name]

    def read(self, start: int, count: int) -> Samples | ImageSamples:
        """Samples ``start`` to ``start + count - 1`` of the mixture."""
        sources, indices = self.timeline.where(start, count)
        mixed: Samples | ImageSamples | None = None
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)  # their indices follow one another
            samples = self._widened(self._stream(source).read(int(indices[rows[0]]), len(rows)))
            if len(rows) == count:
                return samples
            if mixed is None:
                mixed = type(samples)(*(np.empty((count, *array.shape[1:]), array.dtype) for array in samples))
            for array, own in zip(mixed, samples, strict=True):
                array[rows] = own
        assert mixed is not None
        return mixed

    def documents(self, start: int, count: int) -> Record:
        """Which documents lie in samples ``start`` to ``start + count - 1``; nothing is read."""
        sources, indices = self.timeline.where(start, count)
        parts = []
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            found = self._stream(source).documents(int(indices[rows[0]]), len(rows))
            sources_of = np.full(len(found.documents), source, np.int64)
            parts.append(Record(rows[found.rows], sources_of, found.documents, found.offsets))
        record = Record(*map(np.concatenate, zip(*parts, strict=True)))
        order = np.argsort(record.rows, kind="stable")
        return Record(*(column[order] for column in record))

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

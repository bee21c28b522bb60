"""Several sample streams as one, each read at its share: global sample i -> (source, its own index), a pure function.

Nothing is remembered: the cursor and the mixture's history (timeline.py) resume exactly, at any place.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data_pipeline.ledger import Record
from data_pipeline.pack import ImageSamples, Pieces, Samples, SourceStream, TokenStream, pack
from data_pipeline.timeline import Timeline

Part = tuple[int, Any, int, np.ndarray]


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
        parts = self._parts(start, count)
        streams = [stream for _, stream, _, _ in parts]
        if self._patch_shape is None and all(isinstance(stream, TokenStream) for stream in streams):
            return self._packed(parts, count)
        mixed: Samples | ImageSamples | None = None
        for _, stream, first, rows in parts:
            samples = self._widened(stream.read(first, len(rows)))
            if len(rows) == count:
                return samples
            if mixed is None:
                mixed = type(samples)(*(np.empty((count, *array.shape[1:]), array.dtype) for array in samples))
            for array, own in zip(mixed, samples, strict=True):
                array[rows] = own
        assert mixed is not None
        return mixed

    def _packed(self, parts: list[Part], count: int) -> Samples:
        """Text of several sources laid out at once, without a copy of each source's rows."""
        found = [(stream, rows, stream.pieces(first, len(rows))) for _, stream, first, rows in parts]
        if len(found) == 1:
            return parts[0][1].read(parts[0][2], count)
        columns = [Pieces(rows[pieces.rows], *pieces[1:]) for _, rows, pieces in found]
        pieces = Pieces(*map(np.concatenate, zip(*columns, strict=True)))
        order = np.argsort(pieces.rows, kind="stable")
        views = [view for stream, _, own in found for view in stream.views(own)]
        skips = np.concatenate([stream.skips(own) for stream, _, own in found])
        pieces = Pieces(*(column[order] for column in pieces))
        return pack(pieces, [views[place] for place in order.tolist()], count, self.seq_len, skips[order])

    def _parts(self, start: int, count: int) -> list[Part]:
        """(number, stream, its first sample, rows) of each source in these samples; a source's follow one another."""
        sources, indices = self.timeline.where(start, count)
        parts = []
        for source in sorted(set(sources.tolist())):
            rows = np.flatnonzero(sources == source)
            parts.append((source, self._stream(source), int(indices[rows[0]]), rows))
        return parts

    def documents(self, start: int, count: int) -> Record:
        """Which documents lie in samples ``start`` to ``start + count - 1``; nothing is read."""
        records = []
        for source, stream, first, rows in self._parts(start, count):
            found = stream.documents(first, len(rows))
            records.append(Record(rows[found.rows], np.full(len(found.rows), source), found.documents, found.offsets))
        if len(records) == 1:
            return records[0]
        record = Record(*map(np.concatenate, zip(*records, strict=True)))
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

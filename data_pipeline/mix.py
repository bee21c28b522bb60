"""Several sample streams as one, each read at its share: global sample i -> (source, its own index), a pure function.

Nothing is remembered: the cursor and the mixture's history (timeline.py) resume exactly, at any place.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from data_pipeline.ahead import Ahead
from data_pipeline.ledger import Record
from data_pipeline.loader import Closing
from data_pipeline.pack import ImageSamples, Pieces, Samples, SourceStream, TokenStream, pack
from data_pipeline.timeline import Timeline

Part = tuple[int, Any, int, np.ndarray]


class Laid(NamedTuple):
    """`Pieces` of several sources, [n] each."""

    rows: np.ndarray
    columns: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray  # number of the source
    skipped: np.ndarray  # whether the document is left out


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
        self._text = all(isinstance(stream, TokenStream) for stream in streams.values())
        self._ahead = Ahead(self._laid)

    def _stream(self, number: int) -> SourceStream:
        name = self.timeline.names[number]
        if name not in self.streams:
            raise ValueError(f"source {name!r} is no longer in the mixture; name it in data.sources to read it again")
        return self.streams[name]

    def read(self, start: int, count: int) -> Samples | ImageSamples:
        """Samples ``start`` to ``start + count - 1`` of the mixture."""
        if self._text:
            return self._packed(self._ahead(start, count), count)
        mixed: Samples | ImageSamples | None = None
        for _, stream, first, rows in self._parts(start, count):
            samples = self._widened(stream.read(first, len(rows)))
            if len(rows) == count:
                return samples
            if mixed is None:
                mixed = type(samples)(*(np.empty((count, *array.shape[1:]), array.dtype) for array in samples))
            for array, own in zip(mixed, samples, strict=True):
                array[rows] = own
        assert mixed is not None
        return mixed

    def _packed(self, laid: Laid, count: int) -> Samples:
        """Text of several sources laid out at once, without a copy of each source's rows."""
        sources, views = set(laid.sources.tolist()), {}
        for source in sources:
            own = laid.sources == source if len(sources) > 1 else slice(None)
            documents, offsets, lengths = laid.documents[own], laid.offsets[own], laid.lengths[own]
            stream: Any = self._stream(source)
            views[source] = iter(stream.dataset.views(documents, offsets, lengths))
        in_order = [next(views[source]) for source in laid.sources.tolist()]
        return pack(Pieces(*laid[:5]), in_order, count, self.seq_len, laid.skipped)

    def _laid(self, start: int, count: int) -> Laid:
        """What these samples are made of, where all sources are text."""
        found = []
        for source, stream, first, rows in self._parts(start, count):
            pieces: Pieces = stream.pieces(first, len(rows))
            own = pieces._replace(rows=rows[pieces.rows])
            found.append(Laid(*own, sources=np.full(len(own.rows), source), skipped=stream.skips(pieces)))
        if len(found) == 1:
            return found[0]
        laid = Laid(*map(np.concatenate, zip(*found, strict=True)))
        order = np.argsort(laid.rows, kind="stable")
        return Laid(*(column[order] for column in laid))

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

    def close(self) -> None:
        """Close the streams that can be."""
        for stream in self.streams.values():
            if isinstance(stream, Closing):
                stream.close()

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

"""Sources mixed by weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Loader
from data_pipeline.mix import MixedStream
from data_pipeline.pack import ImageSamples, Samples
from data_pipeline.timeline import Phase, Share, Timeline


class Numbered:
    """Rows whose tokens say which source and which sample they are."""

    def __init__(self, source: int, seq_len: int = 4) -> None:
        self.source, self.seq_len = source, seq_len
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, count: int) -> Samples | ImageSamples:
        self.reads.append((start, count))
        tokens = np.repeat(np.arange(start, start + count)[:, None], self.seq_len + 1, 1).astype(np.int32)
        flat = np.full((count, self.seq_len), self.source, np.int32)
        return Samples(tokens, flat, flat.copy(), flat.copy())


class Pictured(Numbered):
    patch_shape = (6, 12)

    def read(self, start: int, count: int) -> ImageSamples:
        flat = np.zeros((count, self.seq_len), np.int32)
        patches = np.full((count, 6, 12), 200, np.uint8)
        cells = np.ones((count, 6, 2), np.int32)
        return ImageSamples(*super().read(start, count), flat, flat.copy(), patches, cells[..., 0] * 0, cells)


def rows_of(samples: Samples | ImageSamples) -> list[tuple[int, int]]:
    return list(zip(samples.targets[:, 0].tolist(), samples.tokens[:, 0].tolist(), strict=True))


def mixture(*streams: tuple[Numbered, float]) -> MixedStream:
    shares = [Share(f"s{place}", ((0, weight),)) for place, (_, weight) in enumerate(streams)]
    return MixedStream({f"s{place}": stream for place, (stream, _) in enumerate(streams)}, Timeline.of(shares))


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.7, 0.3, 1.0, 1 / 3, 1e-4, 25.0, 2.5]), min_size=1, max_size=5),
    start=st.integers(0, 5000),
    count=st.integers(1, 3000),
)
def test_rows_are_those_of_the_timeline(weights, start, count) -> None:
    streams = [(Numbered(source), weight) for source, weight in enumerate(weights)]
    mixed = mixture(*streams)
    sources, indices = mixed.timeline.where(start, count)
    assert rows_of(mixed.read(start, count)) == list(zip(sources.tolist(), indices.tolist(), strict=True))
    assert all(len(stream.reads) <= 1 for stream, _ in streams), "one read of each source"


def test_text_among_pictures_has_empty_image_arrays() -> None:
    mixed = mixture((Numbered(0), 1), (Pictured(1), 1))
    samples = mixed.read(0, 40)
    assert isinstance(samples, ImageSamples)
    text = samples.targets[:, 0] == 0
    assert 5 < text.sum() < 35
    assert (samples.slots[text] == -1).all() and (samples.spans[text] == -1).all()
    assert (samples.images[text] == -1).all() and not samples.patches[text].any() and not samples.grid[text].any()
    assert (samples.patches[~text] == 200).all() and (samples.images[~text] == 0).all()
    text_alone = next(start for start in range(1000) if mixed.timeline.where(start, 1)[0][0] == 0)
    one = mixed.read(text_alone, 1)
    assert isinstance(one, ImageSamples) and one.patches.shape == (1, 6, 12), "also where no picture is near"
    assert isinstance(mixture((Numbered(0), 1), (Numbered(1), 2)).read(0, 9), Samples)


def test_resume_by_the_cursor_alone() -> None:
    sources = (Numbered(0), 0.6), (Pictured(1), 0.4)
    with Loader(mixture(*sources), global_batch=8, micro_batch=8) as loader:
        steps = [next(loader) for _ in range(300)]
    cursor = steps[199][1]
    with Loader(mixture(*sources), global_batch=8, micro_batch=4, cursor=cursor) as loader:
        for batches, _ in steps[200:]:
            again, _ = next(loader)
            for name, value in batches[0].items():
                assert np.array_equal(value, np.concatenate([batch[name] for batch in again])), name


def test_sources_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples of \[4, 8\] tokens; give all the same seq_len"):
        mixture((Numbered(0), 1), (Numbered(1, 8), 1))
    other = Pictured(1)
    other.patch_shape = (6, 27)
    with pytest.raises(ValueError, match=r"different patches and values of a patch \[\(6, 12\), \(6, 27\)\]"):
        mixture((Pictured(0), 1), (other, 1))


def test_a_source_that_was_dropped_is_asked_for_by_name() -> None:
    timeline = Timeline([Phase(0, (Share("old"),)), Phase(10, (Share("new"),), {"old": 10})])
    mixed = MixedStream({"new": Numbered(0)}, timeline)
    assert rows_of(mixed.read(10, 3)) == [(0, 0), (0, 1), (0, 2)]
    with pytest.raises(ValueError, match="source 'old' is no longer in the mixture"):
        mixed.read(9, 2)

"""Sources mixed by weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Loader
from data_pipeline.mix import MixedStream
from data_pipeline.pack import ImageSamples, Samples


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


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.7, 0.3, 1.0, 1 / 3, 1e-4, 25.0, 2.5]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    start=st.integers(0, 5000),
    count=st.integers(1, 3000),
)
def test_each_source_is_read_on_at_its_share(weights, seed, start, count) -> None:
    mixed = MixedStream([(Numbered(source), weight) for source, weight in enumerate(weights)], seed=seed)
    whole = rows_of(mixed.read(0, start + count))
    blocks = len(whole) // mixed._block * mixed._block
    for source, weight in enumerate(weights):
        own = [index for found, index in whole if found == source]
        assert own == list(range(len(own))), "none left out, none twice, in order"
        share = blocks * weight / sum(weights)
        inside = sum(found == source for found, _ in whole[:blocks])
        assert abs(inside - share) < 1 + 1e-6, "exact to a sample after each block"
    again = MixedStream([(Numbered(source), weight) for source, weight in enumerate(weights)], seed=seed)
    assert rows_of(again.read(start, count)) == whole[start:]
    assert all(len(stream.reads) <= 1 for stream in again.streams), "one read of each source"


def test_order_is_shuffled_by_the_seed_and_block() -> None:
    orders = [
        MixedStream([(Numbered(0), 1), (Numbered(1), 1)], seed=seed).where(begin, 1024)[0].tolist()
        for seed, begin in ((1, 0), (1, 1024), (2, 0))
    ]
    assert all(sum(order) == 512 for order in orders) and len(set(map(tuple, orders))) == 3
    runs = np.diff(np.flatnonzero(np.diff(orders[0])))
    assert runs.max() < 20 and 1.5 < runs.mean() < 2.5


def test_text_among_pictures_has_empty_image_arrays() -> None:
    mixed = MixedStream([(Numbered(0), 1), (Pictured(1), 1)], seed=0)
    samples = mixed.read(0, 40)
    assert isinstance(samples, ImageSamples)
    text = samples.targets[:, 0] == 0
    assert 5 < text.sum() < 35
    assert (samples.slots[text] == -1).all() and (samples.spans[text] == -1).all()
    assert (samples.images[text] == -1).all() and not samples.patches[text].any() and not samples.grid[text].any()
    assert (samples.patches[~text] == 200).all() and (samples.images[~text] == 0).all()
    text_alone = next(start for start in range(1000) if mixed.where(start, 1)[0][0] == 0)
    one = mixed.read(text_alone, 1)
    assert isinstance(one, ImageSamples) and one.patches.shape == (1, 6, 12), "also where no picture is near"
    assert isinstance(MixedStream([(Numbered(0), 1), (Numbered(1), 2)]).read(0, 9), Samples)


def test_resume_by_the_cursor_alone() -> None:
    sources = [(Numbered(0), 0.6), (Pictured(1), 0.4)]
    with Loader(MixedStream(sources, seed=5), global_batch=8, micro_batch=8) as loader:
        steps = [next(loader) for _ in range(300)]
    cursor = steps[199][1]
    with Loader(MixedStream(sources, seed=5), global_batch=8, micro_batch=4, cursor=cursor) as loader:
        for batches, _ in steps[200:]:
            again, _ = next(loader)
            for name, value in batches[0].items():
                assert np.array_equal(value, np.concatenate([batch[name] for batch in again])), name


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no source"),
        ([(Numbered(0), 1), (Numbered(1), 0)], r"weights \[1, 0\]: each must be a number above 0"),
        ([(Numbered(0), 1), (Numbered(1), float("nan"))], "each must be a number above 0"),
        ([(Numbered(0), 1), (Numbered(1, 8), 1)], r"samples of \[4, 8\] tokens; give all the same seq_len"),
    ],
)
def test_impossible_mixtures(sources, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixedStream(sources)


def test_pictures_of_different_shapes_are_refused() -> None:
    other = Pictured(1)
    other.patch_shape = (6, 27)
    with pytest.raises(ValueError, match=r"different patches and values of a patch \[\(6, 12\), \(6, 27\)\]"):
        MixedStream([(Pictured(0), 1), (other, 1)])

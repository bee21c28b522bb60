"""The global sequence of samples under any layout of readers, with and without resumes and edits of the mixture."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.loader import Loader
from data_pipeline.mix import MixedStream
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.timeline import Share, Timeline
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.data_pipeline.images import captioned, small_tokenizer, write_tar

SEQ_LEN, PATCHES, SIDE, SEED = 48, 16, 8, 5
FORM = PictureForm(patch=SIDE, image_token=1, resize="crop", size=16)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("global")
    text = {
        name: TokenDataset(
            make_shards(folder / name, unique_documents(lengths), num_shards=3, vocab_size=9999) / "*.tar"
        )
        for name, lengths in (("a", [5, 90, 31] * 20), ("b", [17] * 60))
    }
    shard = write_tar(folder / "pictures.tar", [captioned(i, 16 + i, 20) for i in range(12)])
    return text | {"pictures": ImageTextDataset(shard, small_tokenizer(), progress=False)}


def open_stream(datasets: dict, timeline: Timeline, workers: int) -> MixedStream:
    options = {"seq_len": SEQ_LEN, "seed": SEED}
    streams = {name: TokenStream(datasets[name], **options) for name in ("a", "b")}
    pictures = ImageTextStream(datasets["pictures"], FORM, patches=PATCHES, workers=workers, **options)
    return MixedStream({**streams, "pictures": pictures}, timeline)


LAYOUTS = st.tuples(
    st.sampled_from([1, 2, 4]),  # data ranks
    st.sampled_from([0, 2]),  # workers
    st.sampled_from([1, 2, 4]),  # micro-batches a rank and step
    st.sampled_from([0, 1, 3]),  # prefetch
)
SHARES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3).filter(any)
NAMES = ("a", "b", "pictures")


def steps(
    stream: MixedStream, layout: tuple[int, int, int, int], batch: int, cursor: int
) -> Iterator[tuple[list, int]]:
    """Global samples of each step as digests, put together from all ranks' micro-batches."""
    ranks, _, parts, prefetch = layout
    parts = min(parts, batch // ranks)
    loaders = [
        Loader(
            stream,
            global_batch=batch,
            micro_batch=batch // ranks // parts,
            rank=rank,
            world=ranks,
            cursor=cursor,
            prefetch=prefetch,
        )
        for rank in range(ranks)
    ]
    try:
        while True:
            found, ends = [], set()
            for loader in loaders:
                micro_batches, end = next(loader)
                ends.add(end)
                for one in micro_batches:
                    rows = zip(*(value.numpy() for _, value in sorted(one.items())), strict=True)
                    found += [hashlib.blake2b(b"".join(map(np.ndarray.tobytes, row))).hexdigest() for row in rows]
            yield found, ends.pop()
            assert not ends, "all ranks are at the same place"
    finally:
        for loader in loaders:
            loader.close()


@settings(max_examples=50, deadline=None)
@given(
    first=SHARES,
    legs=st.lists(
        st.tuples(LAYOUTS, st.sampled_from([4, 8]), st.integers(1, 3), st.one_of(st.none(), SHARES)),
        min_size=1,
        max_size=4,
    ),
)
def test_the_sequence_is_the_same_whatever_reads_it(datasets, first, legs) -> None:
    """Each leg: other readers, another global batch, perhaps another mixture; the state goes through JSON as saved."""
    shares = [Share(name, ((0, weight),)) for name, weight in zip(NAMES, first, strict=True)]
    timeline, cursor, seen = Timeline.of(shares), 0, []
    for layout, batch, count, edit in legs:
        if edit is not None:
            timeline = timeline.edited(cursor, [Share(n, ((0, w),)) for n, w in zip(NAMES, edit, strict=True)])
        timeline = Timeline.from_state(timeline.state())
        reading = steps(open_stream(datasets, timeline, layout[1]), layout, batch, cursor)
        for _ in range(count):
            found, cursor = next(reading)
            seen += found
        reading.close()
    assert len(seen) == cursor
    plain, _ = next(steps(open_stream(datasets, timeline, 0), (1, 0, 1, 0), cursor, 0))
    assert seen == plain


def test_another_global_batch_loses_and_repeats_nothing_in_an_epoch(datasets: dict) -> None:
    stream = TokenStream(datasets["a"], seq_len=SEQ_LEN, seed=SEED)
    mixed = MixedStream({"a": stream}, Timeline.of([Share("a")]))
    cursor, tokens = 0, []
    for batch, count in ((3, 4), (8, 2), (1, 5), (stream.num_samples - 33, 1)):
        with Loader(mixed, global_batch=batch, micro_batch=batch, cursor=cursor) as loader:
            for _ in range(count):
                (one,), cursor = next(loader)
                tokens += one["tokens"].flatten().tolist()
    assert cursor == stream.num_samples
    assert len(set(tokens)) >= datasets["a"].num_tokens - 1, "each token but the last, which is a target alone"
    assert len(tokens) - len(set(tokens)) < SEQ_LEN, "the last sample runs on into the next epoch"

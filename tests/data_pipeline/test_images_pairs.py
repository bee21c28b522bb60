"""Pairs: one picture and one caption a row."""

import numpy as np
import pytest

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.problems import Skip
from data_pipeline.pack import IGNORED
from tests.data_pipeline.images import WORDS, captioned, encoded, picture, small_tokenizer, write_tar

TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ImageTextDataset:
    draw = np.random.default_rng(0)
    samples = [
        captioned(n, *draw.integers(6, 40, 2), " ".join(draw.choice(WORDS, 1 + n)), json={"label": n % 10})
        for n in range(12)
    ]
    samples[5]["png"] = samples[5]["png"][:-100]
    samples.append({"__key__": "two", "0.png": encoded(picture(9, 9)), "1.png": encoded(picture(9, 9)),
                    "txt": "<image> <image>"})  # fmt: skip
    shard = write_tar(tmp_path_factory.mktemp("pairs") / "a.tar", samples)
    return ImageTextDataset(shard, TOKENIZER, on_problem=Skip(), progress=False)


@pytest.mark.parametrize("resize", ["crop", "native"])
def test_rows_are_pairs(dataset, resize) -> None:
    form = PictureForm(patch=4, image_token=0, resize=resize, size=16, max_patches=25, class_slot=True)
    stream = PairStream(dataset, form, seq_len=12, shuffle=False, workers=2)
    assert stream.num_samples == 12 and stream.labels.tolist() == [n % 10 for n in range(12)]
    assert dataset.on_problem.counts and "two" in {key for _, key in dataset.on_problem._seen}
    batch = stream.read(0, 12)
    assert batch.patches.shape == (12, form.fullest, 48) and batch.tokens.shape == (12, 13)
    assert (batch.targets == IGNORED).all() and (batch.slots == -1).all() and (batch.spans == -1).all()
    for row in range(12):
        length, filled = int((batch.documents[row] >= 0).sum()), int((batch.images[row] >= 0).sum())
        if row == 5:
            assert length == filled == 0, "a broken picture's row is no pair"
            continue
        caption = np.concatenate(dataset.texts([row])[0])[:11].tolist()
        assert batch.tokens[row, :length].tolist() == [*caption, TOKENIZER.eos_id]
        assert (batch.tokens[row, length:] == TOKENIZER.eos_id).all()
        assert batch.positions[row, :length].tolist() == list(range(length))
        grid = tuple(form.grids(dataset.sizes[row][None])[0].tolist())
        expected = form.patches(dataset.pixels(row, 0, grid, form))
        assert filled == len(expected) and np.array_equal(batch.patches[row, :filled], expected)
        assert np.array_equal(batch.grid[row, :filled], form.cells(grid)) and not batch.patches[row, filled:].any()
    assert max((batch.documents >= 0).sum(1)) == 12, "a caption that is too long ends with the end-of-text token"
    stream.close()


def test_rows_are_a_function_of_seed_and_index(dataset) -> None:
    form = PictureForm(patch=4, image_token=0, size=8)
    stream = PairStream(dataset, form, seq_len=12, seed=3)
    whole = stream.read(0, 30)
    again = PairStream(dataset, form, seq_len=12, seed=3, workers=3)
    for start, count in ((20, 10), (0, 1), (10, 5)):
        for name, array in again.read(start, count)._asdict().items():
            assert np.array_equal(array, getattr(whole, name)[start : start + count]), name
    again.close()
    epochs = [stream.places(begin, 12).tolist() for begin in (0, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]


def test_shards_are_shuffled_a_few_together(tmp_path) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [captioned(10 * shard + n) for n in range(10)])
    dataset = ImageTextDataset(tmp_path / "*.tar", TOKENIZER, progress=False)
    stream = PairStream(dataset, PictureForm(patch=4, image_token=0, size=8), seq_len=12, seed=1, together=2)
    for epoch in range(3):
        shards = stream.places(40 * epoch, 40) // 10
        assert sorted(shards.tolist()) == sorted([0, 1, 2, 3] * 10)
        halves = [set(half.tolist()) for half in np.split(shards, 2)]
        assert len(halves[0]) == len(halves[1]) == 2 and len(set(shards[:8].tolist())) == 2
    epochs = [stream.places(40 * epoch, 40).tolist() for epoch in (0, 1)]
    assert epochs[0] != epochs[1]


def test_shards_without_pairs(tmp_path) -> None:
    dataset = ImageTextDataset(write_tar(tmp_path / "a.tar", [{"__key__": "t", "txt": "text alone"}]), TOKENIZER)
    with pytest.raises(ValueError, match="no sample has exactly one picture"):
        PairStream(dataset, PictureForm(patch=4, image_token=0, size=8), seq_len=8)

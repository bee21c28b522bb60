"""Packed rows with pictures against a plain rebuilding of them, document by document."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pack import pack_rows
from data_pipeline.images.problems import Skip
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.loader import Loader
from data_pipeline.pack import IGNORED, ImageSamples
from tests.data_pipeline.images import WORDS, captioned, encoded, picture, small_tokenizer, write_tar

TOKENIZER = small_tokenizer()
IMAGE, NEWLINE = 300, 301
FORMS = {
    "native": {"resize": "native", "max_patches": 36},
    "merge": {"resize": "native", "max_patches": 64, "merge": 2},
    "class": {"resize": "native", "max_patches": 30, "class_slot": True},
    "newline": {"resize": "native", "max_patches": 20, "newline_token": NEWLINE},
    "queries": {"resize": "native", "max_patches": 36, "queries": 6},
    "crop": {"resize": "crop", "size": 16},
}


def form(name: str) -> PictureForm:
    return PictureForm(**({"patch": 4, "image_token": IMAGE} | FORMS[name]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    draw = np.random.default_rng(0)
    samples = [captioned(n, *draw.integers(4, 60, 2), " ".join(draw.choice(WORDS, 1 + n % 7))) for n in range(50)]
    samples += [
        {
            "__key__": f"doc{number}",
            "txt": "a dog <image> of<image> two " * number + " red " * 40 * (number % 2),
            **{f"{k}.png": encoded(picture(9 + 3 * k, 30 - k, number)) for k in range(2 * number)},
        }
        for number in range(1, 5)
    ]
    samples.append({"__key__": "text", "txt": "no picture at all"})
    half = len(samples) // 2
    write_tar(folder / "a.tar", samples[:half])
    write_tar(folder / "b.tar", samples[half:])
    return folder


@pytest.fixture(scope="module")
def dataset(shards) -> ImageTextDataset:
    return ImageTextDataset(shards / "*.tar", TOKENIZER, progress=False)


def documents_of(dataset: ImageTextDataset, kind: PictureForm, seq_len: int, budget: int) -> list[tuple]:
    """Every sample's (ids, places within its patches, span, patches, grid), by a loop over its pieces."""
    found = []
    for sample in range(dataset.num_samples):
        ids, slots, spans, patches, cells, images = [], [], [], [], [], []
        begin = int(dataset.first[sample])
        pieces = dataset.texts([sample])[0]
        for number, piece in enumerate(pieces):
            ids += piece.tolist()
            slots += [-1] * len(piece)
            spans += [-1] * len(piece)
            if number == len(pieces) - 1:
                ids, slots, spans = [*ids, TOKENIZER.eos_id], [*slots, -1], [*spans, -1]
                break
            grid = tuple(kind.grids(dataset.sizes[begin + number][None])[0].tolist())
            own_ids, own_slots = kind.tokens(grid, len(patches))
            own = kind.patches(dataset.pixels(sample, number, grid, kind)).tolist()
            if len(ids) + len(own_ids) >= seq_len or len(patches) + len(own) > budget:
                break
            ids += own_ids.tolist()
            slots += own_slots.tolist()
            spans += [number] * len(own_ids)
            patches += own
            cells += kind.cells(grid).tolist()
            images += [number] * len(own)
        found.append((ids[:seq_len], slots[:seq_len], spans[:seq_len], patches, cells, images))
    return found


def documents_in(batch: ImageSamples) -> list[tuple]:
    """The same out of packed rows, whose invariants are checked on the way."""
    found = []
    for row in range(len(batch.tokens)):
        one = ImageSamples(*(array[row] for array in batch))
        length, filled = int((one.documents >= 0).sum()), int((one.images >= 0).sum())
        assert (one.documents[:length] >= 0).all() and (one.images[:filled] >= 0).all(), "padding stands at the end"
        assert (one.targets[length:] == IGNORED).all() and (one.slots[length:] == -1).all()
        assert not one.patches[filled:].any() and not one.grid[filled:].any()
        place = image = 0
        for document in range(int(one.documents.max()) + 1):
            where = np.flatnonzero(one.documents == document)
            assert where.tolist() == list(range(where[0], where[0] + len(where)))
            assert one.positions[where].tolist() == list(range(len(where)))
            ids, slots, spans, targets = (
                array[where].tolist() for array in (one.tokens[:-1], one.slots, one.spans, one.targets)
            )
            expected = [IGNORED if span >= 0 else token for token, span in zip(ids[1:], spans[1:], strict=True)]
            assert targets == [*expected, IGNORED]
            numbers = [span - image if span >= 0 else -1 for span in spans]
            own = [place + k for k in range(filled - place) if image <= one.images[place + k] <= image + max(numbers)]
            found.append(
                (
                    ids,
                    [slot - place if slot >= 0 else -1 for slot in slots],
                    numbers,
                    one.patches[own].tolist(),
                    one.grid[own].tolist(),
                    (one.images[own] - image).tolist(),
                )
            )
            place, image = place + len(own), image + max(numbers) + 1
        assert place == filled
    return found


@pytest.mark.parametrize("name", FORMS)
def test_an_epoch_holds_every_document_once(dataset, name) -> None:
    seq_len, budget = 90, 128
    stream = ImageTextStream(dataset, form(name), seq_len=seq_len, patches=budget, seed=4)
    batch = stream.read(0, stream.num_samples)
    assert batch.tokens.shape == (stream.num_samples, seq_len + 1)
    assert batch.patches.shape == (stream.num_samples, budget, 48) and batch.patches.dtype == np.uint8
    assert {array.dtype.name for array in batch} == {"int32", "uint8"}
    expected = documents_of(dataset, form(name), seq_len, budget)
    assert sorted(documents_in(batch)) == sorted(expected)
    assert stream.num_cut == sum(document[0][-1] != TOKENIZER.eos_id for document in expected) > 0
    assert stream.num_samples < 0.6 * dataset.num_samples, "rows hold several documents"


def test_rows_are_a_function_of_seed_and_index(shards, dataset) -> None:
    kind = form("native")
    stream = ImageTextStream(dataset, kind, seq_len=90, patches=128, seed=1)
    count = stream.num_samples
    whole = stream.read(0, 2 * count)
    again = ImageTextStream(
        ImageTextDataset(shards / "*.tar", TOKENIZER), kind, seq_len=90, patches=128, seed=1, workers=3
    )
    for start, rows in ((0, 1), (count - 2, 4), (2 * count - 3, 3), (5, 2)):
        for name, array in again.read(start, rows)._asdict().items():
            assert np.array_equal(array, getattr(whole, name)[start : start + rows]), name
    again.close()
    first, second = whole.tokens[:count].tolist(), whole.tokens[count:].tolist()
    assert first != second and sorted(first) == sorted(second), "an epoch is the last one's rows in another order"
    other = ImageTextStream(dataset, kind, seq_len=90, patches=128, seed=2)
    assert sorted(other.read(0, other.num_samples).tokens.tolist()) != sorted(first)
    with pytest.raises(ValueError, match="start must be 0 or more"):
        stream.read(-1, 2)


def test_shards_are_shuffled_a_few_together(tmp_path) -> None:
    """Of 6 shards, 2 at a time: rows hold samples of 2 shards alone, until these are used up."""
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", [captioned(40 * shard + n, 8, 8) for n in range(20 + 5 * shard)])
    dataset = ImageTextDataset(tmp_path / "*.tar", TOKENIZER, progress=False)
    options = {"seq_len": 60, "patches": 36, "seed": 1}
    stream = ImageTextStream(dataset, form("native"), together=2, **options)
    count, orders, firsts = stream.num_samples, [], []
    for epoch in range(3):
        rows = stream.rows(epoch * count, count)
        again = [stream.rows(epoch * count + place, 1)[0].tolist() for place in (count - 1, 3)]
        assert again == [rows[-1].tolist(), rows[3].tolist()]
        assert sorted(np.concatenate(rows).tolist()) == list(range(dataset.num_samples))
        groups = list(dict.fromkeys(tuple(sorted(set(dataset.shards_of(row).tolist()))) for row in rows))
        pairs = [group for group in groups if len(group) == 2]
        assert sorted(shard for pair in pairs for shard in pair) == list(range(6)), "packed among two shards"
        owner = {shard: pair for pair in pairs for shard in pair}
        owners = [owner[int(dataset.shards_of(row)[0])] for row in rows]
        assert len([a for a, b in pairwise(owners) if a != b]) == 2, "one pair of shards after the other"
        orders.append(list(dict.fromkeys(owners)))
        firsts.append([row.tolist() for row, pair in zip(rows, owners, strict=True) if pair == orders[0][0]])
    assert len({tuple(order) for order in orders}) > 1 and firsts[0] != firsts[1]
    assert sorted(firsts[0]) == sorted(firsts[1])
    alone = [ImageTextStream(dataset, form("native"), together=n, **options).rows(0, 2 * count) for n in (0, 9)]
    assert [row.tolist() for row in alone[0]] == [row.tolist() for row in alone[1]]


def test_loader_slices_rows_with_all_their_arrays(dataset) -> None:
    stream = ImageTextStream(dataset, form("merge"), seq_len=90, patches=128, seed=1, workers=2)
    whole = stream.read(4, 8)
    ranks = []
    for rank in range(2):
        with Loader(stream, global_batch=8, micro_batch=2, rank=rank, world=2, cursor=4) as loader:
            batches, cursor = next(loader)
            assert cursor == 12
            ranks += batches
    for name, array in whole._asdict().items():
        expected = array[:, :-1] if name == "tokens" else array
        assert np.array_equal(np.concatenate([batch[name] for batch in ranks]), expected), name
    stream.close()


def test_document_with_a_broken_picture_leaves_its_row(tmp_path) -> None:
    draw = np.random.default_rng(3)
    samples = [captioned(n, *draw.integers(8, 40, 2)) for n in range(20)]
    whole = ImageTextDataset(write_tar(tmp_path / "whole.tar", samples), TOKENIZER)
    for number in (3, 11):
        samples[number] = samples[number] | {"png": samples[number]["png"][:-100]}
    skip = Skip()
    torn = ImageTextDataset(write_tar(tmp_path / "torn.tar", samples), TOKENIZER, on_problem=skip)
    streams = [ImageTextStream(d, form("native"), seq_len=60, patches=128, seed=2) for d in (whole, torn)]
    count = streams[0].num_samples
    assert streams[1].num_samples == count and skip.num_skipped == 0
    kept = [documents_in(stream.read(0, count)) for stream in streams]
    bad = [
        document for sample, document in enumerate(documents_of(whole, form("native"), 60, 128)) if sample in (3, 11)
    ]
    assert sorted(kept[1] + bad) == sorted(kept[0])
    assert skip.num_skipped == 2
    for row in range(count):  # nothing moves to another row
        assert {str(d) for d in documents_in(streams[1].read(row, 1))} <= {
            str(d) for d in documents_in(streams[0].read(row, 1))
        }


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=60),
    window=st.integers(1, 70),
)
def test_packing_takes_each_sample_once_within_both_budgets(sizes, window) -> None:
    tokens, patches = np.array(sizes).T
    order = np.random.default_rng(len(sizes)).permutation(len(sizes))
    rows = pack_rows(tokens, patches, order, seq_len=20, budget=30, window=window)
    assert sorted(rows.members) == list(range(len(sizes)))
    for begin, end in zip(rows.first[:-1], rows.first[1:], strict=True):
        own = rows.members[begin:end]
        assert end > begin and tokens[own].sum() <= 20 and patches[own].sum() <= 30


@pytest.mark.parametrize("merge", [1, 4])
def test_ranks_carry_equal_work_on_a_log_normal_mix(merge) -> None:
    draw = np.random.default_rng(0)
    patches = np.exp(draw.normal(4.6, 0.7, 8000)).astype(int).clip(1, 512)
    tokens = np.exp(draw.normal(3.5, 1.0, 8000)).astype(int).clip(1, 1500) + patches // merge
    rows = pack_rows(tokens, patches, np.arange(8000), seq_len=2048, budget=1024)
    sums = [np.add.reduceat(amounts[rows.members], rows.first[:-1]) for amounts in (tokens, patches)]
    steps = len(sums[0]) // 32
    order = draw.permutation(len(sums[0]))[: steps * 32]
    costs = (sums[0] + sums[1])[order].reshape(steps, 8, 4).sum(2)
    assert (costs.max(1) / costs.mean(1)).mean() < 1.06
    assert sums[1].sum() / (len(sums[1]) * 1024) > 0.97, "the scarce budget is used up"


def test_text_without_any_picture_is_packed_as_well(tmp_path) -> None:
    samples = [{"__key__": f"{n}", "txt": " ".join(WORDS[: 1 + n % 9])} for n in range(200)]
    dataset = ImageTextDataset(write_tar(tmp_path / "a.tar", samples), TOKENIZER, progress=False)
    stream = ImageTextStream(dataset, form("native"), seq_len=64, patches=64, seed=1)
    batch = stream.read(0, stream.num_samples)
    assert (batch.images == -1).all() and (batch.spans == -1).all() and not batch.patches.any()
    assert len(documents_in(batch)) == 200
    assert stream.cost(0, 1, stream.num_samples, 1).token_padding < 0.05


def test_cost_counts_what_rows_hold(dataset) -> None:
    stream = ImageTextStream(dataset, form("native"), seq_len=90, patches=128, seed=1)
    batch = stream.read(0, 8)
    cost = stream.cost(0, 2, 4, 2)
    held = (batch.documents >= 0).sum(1) + (batch.images >= 0).sum(1)
    ranks = held.reshape(2, 2, 2).sum(2)
    ratios = ranks.max(1) / ranks.mean(1)
    assert cost.max_over_mean == pytest.approx(ratios.mean()) and cost.worst == pytest.approx(ratios.max())
    assert cost.token_padding == pytest.approx((batch.documents < 0).mean())
    assert cost.patch_padding == pytest.approx((batch.images < 0).mean())


@pytest.mark.parametrize(
    ("name", "changes", "budgets", "message"),
    [
        ("crop", {}, (90, 15), "pictures of up to 16 patches and 16 tokens do not fit rows of 15 patches"),
        ("crop", {}, (16, 16), "and 16 tokens with text after them; lower size, raise the budgets or resize native"),
        ("native", {"max_patches": 200}, (300, 128), "up to 200 patches .* lower max_patches"),
        ("merge", {}, (90, 130), r"130 patches \(a multiple of 4\)"),
    ],
)
def test_budgets_that_a_picture_does_not_fit(dataset, name, changes, budgets, message) -> None:
    kind = PictureForm(**({"patch": 4, "image_token": IMAGE} | FORMS[name] | changes))
    with pytest.raises(ValueError, match=message):
        ImageTextStream(dataset, kind, seq_len=budgets[0], patches=budgets[1])

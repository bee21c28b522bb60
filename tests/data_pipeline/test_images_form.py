"""Grids, patches and tokens of pictures, against torch's unfold and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.images.form import PictureForm


def form(**changes) -> PictureForm:
    return PictureForm(**{"patch": 4, "image_token": 9, "size": 16, "max_patches": 36} | changes)


def test_patches_are_what_unfold_makes() -> None:
    """A patch must flatten as the weight of a convolution does: (channel, y, x)."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.unfold(channels_first, 4, stride=4)[0].T
    assert np.array_equal(form().patches(picture), expected.numpy())
    with_class = form(class_slot=True).patches(picture)
    assert np.array_equal(with_class[1:], expected.numpy()) and not with_class[0].any()


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_order_of_cells_patches_and_slots_agree(merge) -> None:
    """Block by block: the merged patches of a token follow one another, and its slot is the first of them."""
    kind = form(merge=merge, resize="native", max_patches=144)
    rows, columns = 2 * merge, 3 * merge
    expected = [
        (top * merge + y, left * merge + x)
        for top in range(2)
        for left in range(3)
        for y in range(merge)
        for x in range(merge)
    ]
    assert kind.cells((rows, columns)).tolist() == [list(cell) for cell in expected]
    picture = np.zeros((rows * 4, columns * 4, 3), np.uint8)
    for row in range(rows):
        for column in range(columns):
            picture[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = row * columns + column
    assert kind.patches(picture)[:, 0].tolist() == [row * columns + column for row, column in expected]
    ids, slots = kind.tokens((rows, columns), 50)
    assert ids.tolist() == [9] * 6 and slots.tolist() == [50 + number * merge**2 for number in range(6)]


def test_class_slot_newlines_and_queries_change_tokens() -> None:
    assert form(class_slot=True).cells((1, 2)).tolist() == [[-1, -1], [0, 0], [0, 1]]
    ids, slots = form(class_slot=True).tokens((1, 2), 10)
    assert slots.tolist() == [11, 12], "the class slot's features stand for no token"
    ids, slots = form(newline_token=7).tokens((2, 2), 0)
    assert ids.tolist() == [9, 9, 7, 9, 9, 7] and slots.tolist() == [0, 1, -1, 2, 3, -1]
    ids, slots = form(queries=3).tokens((4, 4), 10)
    assert ids.tolist() == [9] * 3 and slots.tolist() == [10, 11, 12]


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    most=st.integers(9, 400),
    merge=st.sampled_from([1, 2, 3]),
    queries=st.sampled_from([0, 0, 5]),
    class_slot=st.booleans(),
    newline=st.sampled_from([None, 7]),
)
def test_native_grids_keep_budget_and_aspect(height, width, most, merge, queries, class_slot, newline) -> None:
    queries = queries if merge == 1 else 0
    kind = form(
        resize="native",
        max_patches=most,
        merge=merge,
        queries=queries,
        class_slot=class_slot and merge == 1,
        newline_token=None if queries else newline,
    )
    grids = kind.grids(np.array([[height, width]]))
    rows, columns = grids[0].tolist()
    assert rows % merge == 0 and columns % merge == 0 and min(rows, columns) >= 1
    places = int(kind.num_patches(grids)[0])
    assert queries <= places <= kind.fullest and len(kind.cells((rows, columns))) == places
    ids, _ = kind.tokens((rows, columns), 0)
    assert len(ids) == kind.num_tokens(grids)[0] <= kind.most_tokens
    if min(rows, columns) > 3 * merge:  # where there is room to keep it
        assert 2 / 3 < (rows / columns) / (height / width) < 3 / 2


def test_native_keeps_small_pictures_and_shrinks_large_ones() -> None:
    kind = form(resize="native", max_patches=100)
    sizes = np.array([[8, 20], [400, 400], [10, 20_000], [1, 1], [20_000, 10]])
    assert kind.grids(sizes).tolist() == [[2, 5], [10, 10], [1, 100], [1, 1], [100, 1]]
    assert form().grids(sizes).tolist() == [[4, 4]] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 18}, "size 18: must be a multiple of patch 4 x merge 1 = 4"),
        ({"resize": "zoom"}, "resize 'zoom': must be crop, squash or native"),
        ({"resize": "native", "max_patches": 3, "merge": 2}, "max_patches 3 gives 0 patches, a picture needs 4"),
        ({"queries": 17}, "size 16 gives 16 patches, a picture needs 17"),
        ({"merge": 2, "class_slot": True}, "merge goes with neither"),
        ({"queries": 2, "newline_token": 3}, "newline_token with queries"),
    ],
)
def test_impossible_forms(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        form(**changes)

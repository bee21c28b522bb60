"""Pictures and classes: the caption is the label, whatever else it is gets named."""

import numpy as np
import pytest

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.labels import ClassNames, LabelStream, as_tokenizer
from data_pipeline.images.problems import Skip, fatal
from data_pipeline.loader import held_out_batches
from data_pipeline.pack import IGNORED
from tests.data_pipeline.images import captioned, write_tar

NAMES = ["ox", "tabby cat", "q", "tabby"]
CAPTIONS = ["tabby", "ox", "tabby cat", "q", " ox\n", "ox", "tabby cat"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    samples = [captioned(n, caption=caption) for n, caption in enumerate(CAPTIONS)]
    samples[5]["png"] = samples[5]["png"][:-100]
    others = ["an ox", "x", "ox\0", "ochsé"]
    samples += [captioned(n, caption=caption) for n, caption in enumerate(others, len(CAPTIONS))]
    return write_tar(tmp_path_factory.mktemp("labels") / "a.tar", samples)


@pytest.fixture(scope="module")
def skipped():
    return Skip()


@pytest.fixture(scope="module")
def stream(shard, skipped):
    dataset = ImageTextDataset(shard, as_tokenizer(NAMES), on_problem=skipped, progress=False)
    form = PictureForm(patch=4, image_token=0, size=8, class_slot=True)
    return LabelStream(dataset, form, seq_len=7, shuffle=False)


def test_the_first_target_of_a_row_is_its_class(stream, capsys) -> None:
    assert stream.num_samples == 7
    batch = stream.read(0, 7)
    assert batch.targets.shape == (7, 7) and (batch.targets[:, 1:] == IGNORED).all()
    assert batch.targets[:, 0].tolist() == [3, 0, 1, 2, 0, IGNORED, 1], "a broken picture has no class"
    assert batch.patches.shape == (7, 7, 48) and batch.grid.shape == (7, 7, 2)
    assert ((batch.images >= 0).sum(1) == [5, 5, 5, 5, 5, 0, 5]).all()
    assert (batch.images[:, 5:] == -1).all() and not batch.patches[:, 5:].any(), "what no picture fills is padding"
    assert (batch.grid[0, 0] == -1).all() and not batch.patches[0, 0].any() and batch.patches[0, 1:5].any()


def test_captions_that_are_no_class_are_named(stream, shard, skipped, capsys) -> None:
    assert skipped.counts == {str(shard): 5}  # and the broken picture
    dataset = ImageTextDataset(shard, as_tokenizer(NAMES), on_problem=fatal, progress=False)
    why = r"a\.tar: sample '000007': caption 'an ox' is none of the 4 names in model\.classes"
    with pytest.raises(ValueError, match=why) as caught:
        LabelStream(dataset, stream.form, seq_len=7)
    assert "\n" not in str(caught.value)


def test_no_caption_is_a_class(stream, shard) -> None:
    dataset = ImageTextDataset(shard, as_tokenizer(["dog"]), on_problem=Skip(0), progress=False)
    with pytest.raises(ValueError, match=r"no sample's caption is one of model\.classes; a caption must be exactly"):
        LabelStream(dataset, stream.form, seq_len=7)


def test_rows_that_are_too_short(stream) -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len = 4: the largest picture has 5 patches"):
        LabelStream(stream.dataset, stream.form, seq_len=4)


def test_held_out_pictures_count_once(stream) -> None:
    """Whatever the ranks and micro-batches, which do not divide their number."""
    seen = []
    for rank in range(2):
        for batch in held_out_batches(stream, micro_batch=2, rank=rank, world=2):
            seen += batch["targets"][batch["targets"] != IGNORED].tolist()
    assert sorted(seen) == [0, 0, 1, 1, 2, 3]


def test_skipped_samples_have_no_class(stream) -> None:
    less = LabelStream(stream.dataset, stream.form, seq_len=7, shuffle=False, skipped=[1, 4])
    assert (less.read(0, 7).targets[:, 0] == IGNORED).tolist() == [n in (1, 4, 5) for n in range(7)]


def test_texts_come_back_and_only_names_are_one_token() -> None:
    names = ClassNames(NAMES)
    texts = [*NAMES, "x", "an ox", "ochsé", "ox ox"]
    found = names.encode_batch(texts)
    assert [names.decode(ids) for ids in found] == texts
    assert [len(ids) == 1 for ids in found] == [True] * 4 + [False] * 4
    assert [len(ids) for ids in names.encode_batch(["", " "])] == [0, 0]
    assert max(ids.max() for ids in found) < names.vocab_size
    assert names.fingerprint != ClassNames(NAMES[::-1]).fingerprint == ClassNames(NAMES[::-1]).fingerprint
    assert all(isinstance(ids, np.ndarray) for ids in found)


def test_a_name_that_two_classes_have() -> None:
    with pytest.raises(ValueError, match=r"model\.classes: 'crane' is there twice"):
        ClassNames(["crane", "ox", " crane"])

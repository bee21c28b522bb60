"""Shards written here, read by webdataset's own reader."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.images.write import ImageText, split_of, write_image_folder, write_image_shards
from data_pipeline.tokenizer import load_tokenizer


def png(color: int, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def read(shards) -> list[dict]:
    return list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))


def test_webdataset_reads_what_was_written(tmp_path) -> None:
    samples = [
        ImageText("a/one", [("png", png(1))], "ein Bär", {"label": 3}),
        ImageText("a/two", [("png", png(2)), ("jpg", b"second")], "x <image> y <image>"),
        ImageText("b", [("webp", b"third")], "last"),
    ]
    shards = write_image_shards(iter(samples), tmp_path, shard_samples=2)
    assert [path.name for path in shards] == ["train-00000.tar", "train-00001.tar"]
    assert [len(read([path])) for path in shards] == [2, 1]
    found = read(shards)
    assert [sample["__key__"] for sample in found] == ["a/one", "a/two", "b"]
    assert found[0]["png"] == png(1) and found[0]["txt"].decode() == "ein Bär"
    assert json.loads(found[0]["json"]) == {"label": 3}
    assert found[1]["0.png"] == png(2) and found[1]["1.jpg"] == b"second" and "json" not in found[1]
    again = write_image_shards(iter(samples), tmp_path / "again", shard_samples=2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([ImageText("../up", [("png", b"")], "")], "key '../up' must be letters"),
        ([ImageText("/abs", [("png", b"")], "")], "key '/abs' must be"),
        ([ImageText("a.b", [("png", b"")], "")], "key 'a.b' must be"),  # webdataset cuts keys at the first dot
        ([ImageText("a", [("png", b"")], ""), ImageText("a", [("png", b"")], "")], "key 'a' comes twice"),
        ([ImageText("a", [("exe", b"")], "")], "extension 'exe': must be one of .jpg"),
        ([], "there is no sample"),
    ],
)
def test_samples_that_cannot_be_written_leave_no_shard(tmp_path, samples, message) -> None:
    with pytest.raises(ValueError, match=message):
        write_image_shards(samples, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_existing_shards_are_not_mixed_with_new_ones(tmp_path) -> None:
    sample = ImageText("a", [("png", png(1))], "x")
    write_image_shards([sample, sample._replace(key="b")], tmp_path, shard_samples=1)
    with pytest.raises(ValueError, match=r"holds train-\*.tar already"):
        write_image_shards([sample], tmp_path)
    stale = tmp_path / "other-00000.tar.images.idx"
    stale.write_text("of a shard that was removed")
    write_image_shards([sample], tmp_path, name="other")
    assert not stale.exists()


def test_folder_of_classes(tmp_path) -> None:
    for name, count in (("tabby_cat", 30), ("lynx", 50)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "in" / name / f"{number}.PNG").write_bytes(png(number))
    (tmp_path / "in" / "lynx" / "notes.txt").write_text("not a picture")
    counts = write_image_folder(tmp_path / "in", tmp_path / "out", caption="one {name}", held_out=0.25)
    assert sum(counts.values()) == 80 and 8 <= counts["heldout"] <= 32
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["lynx", "tabby cat"]
    files = []
    for split, count in counts.items():
        found = read((tmp_path / "out").glob(f"{split}-*.tar"))
        assert len(found) == count
        for sample in found:
            facts = json.loads(sample["json"])
            folder, _, file = facts["file"].partition("/")
            assert facts["label"] == ["lynx", "tabby_cat"].index(folder)
            assert sample["txt"].decode() == f"one {folder.replace('_', ' ')}"
            assert sample["png"] == png(int(file.removesuffix(".PNG")))
            assert split == split_of(facts["file"], 0.25)
            files.append(facts["file"])
    assert len(set(files)) == 80


def test_folder_without_classes(tmp_path) -> None:
    (tmp_path / "loose.png").write_bytes(png(1))
    with pytest.raises(FileNotFoundError, match="no picture in a folder of a class"):
        write_image_folder(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs \{name\} in it"):
        write_image_folder(tmp_path, tmp_path / "out", caption="a photo")


def test_digits(tmp_path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits_module = pytest.importorskip("data_pipeline.sources.digits")
    counts = digits_module.write_digits(tmp_path)
    assert sum(counts.values()) == 1797 and 300 < counts["heldout"] < 420
    known, seen = datasets.load_digits(), []
    names = json.loads((tmp_path / "classes.json").read_text())
    for split in counts:
        labels = Counter()
        for sample in read(sorted(tmp_path.glob(f"{split}-*.tar"))):
            number = int(sample["__key__"].removeprefix("digit-"))
            image = np.asarray(Image.open(io.BytesIO(sample["png"]))).astype(float)
            assert abs(image / 255 * 16 - known.images[number]).max() < 0.04
            label = json.loads(sample["json"])["label"]
            assert label == known.target[number] and sample["txt"].decode() == f"a handwritten {names[label]}"
            labels[label] += 1
            seen.append(number)
        assert min(labels.values()) > 0.06 * counts[split], "all ten digits in each split"
    assert sorted(seen) == list(range(1797))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    texts = [f"a handwritten {name}" for name in names]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert len({tuple(tokenizer.encode(text)) for text in texts}) == 10

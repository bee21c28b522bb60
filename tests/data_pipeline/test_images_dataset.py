"""Image-text tars: what is found in them, what is kept beside them, what is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.index import PictureIndex, index_path
from data_pipeline.images.problems import Skip, fatal
from tests.data_pipeline.images import captioned, encoded, picture, small_tokenizer, write_tar

TOKENIZER = small_tokenizer()


def text_of(dataset: ImageTextDataset, sample: int) -> list[str]:
    return [TOKENIZER.decode(piece) for piece in dataset.texts([sample])[0]]


def open_shards(shards: Path, **options) -> ImageTextDataset:
    return ImageTextDataset(shards, TOKENIZER, **({"on_problem": fatal, "progress": False} | options))


def test_samples_as_img2dataset_and_webdataset_write_them(tmp_path) -> None:
    jpeg = encoded(picture(10, 16, 1), "JPEG")
    write_tar(
        tmp_path / "a.tar",
        [
            captioned(0, 12, 20, "a red dog"),
            {"__key__": "x/y", "jpg": jpeg, "json": {"caption": "one tree", "label": 3, "url": "u", "width": 16}},
            {"__key__": "both", "jpeg": jpeg, "txt": "  from txt\n", "json": {"caption": "from json", "label": 4}},
            {
                "__key__": "text",
                "webp": encoded(picture(5, 6), "WEBP"),
                "json": {"text": "under text", "caption": None},
            },
            {"__key__": "other", "jpg": jpeg, "txt": "two", "cls": 3, "npy": np.zeros(2)},
        ],
    )
    write_tar(tmp_path / "b.tar", [captioned(7, caption="seven")])
    dataset = open_shards(tmp_path / "{a,b}.tar")
    assert [dataset.key(sample) for sample in range(6)] == ["000000", "x/y", "both", "text", "other", "000007"]
    texts = [text_of(dataset, sample) for sample in range(6)]
    assert texts == [["", text] for text in ("a red dog", "one tree", "from txt", "under text", "two", "seven")]
    assert dataset.labels.tolist() == [-1, 3, 4, -1, -1, -1]
    assert dataset.sizes.tolist() == [[12, 20], [10, 16], [10, 16], [5, 6], [10, 16], [12, 20]]
    assert dataset.tokens.tolist() == [sum(map(len, dataset.texts([sample])[0])) for sample in range(6)]
    assert dataset.picture(1, 0) == jpeg and dataset.picture(0, 0) == captioned(0, 12, 20)["png"]
    last = open_shards(tmp_path / "a.tar", image_first=False)
    assert text_of(last, 1) == ["one tree", ""] and last.before[1] == last.tokens[1] > 0 == dataset.before[1]


def test_interleaved_documents(tmp_path) -> None:
    pictures = {f"{number}.png": encoded(picture(4 + number, 8)) for number in (10, 2, 0)}
    write_tar(tmp_path / "a.tar", [{"__key__": "d", "txt": "a dog <image> of <image><image> two", **pictures}])
    dataset = open_shards(tmp_path / "a.tar")
    assert [text.strip() for text in text_of(dataset, 0)] == ["a dog", "of", "", "two"]
    assert dataset.sizes[:, 0].tolist() == [4, 6, 14], "2 comes before 10"
    pieces = [len(piece) for piece in dataset.texts([0])[0]]
    assert dataset.before.tolist() == np.cumsum(pieces)[:-1].tolist()
    with pytest.raises(ValueError, match=r"a\.tar: sample 'd': 1 placeholders dog for 3 pictures; mend or remove it"):
        open_shards(tmp_path / "a.tar", placeholder="dog")


def test_second_opening_reads_the_index_alone(tmp_path, monkeypatch) -> None:
    shard = write_tar(tmp_path / "a.tar", [captioned(number, 10, 10 + number) for number in range(5)])
    first = open_shards(shard)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("scanned again"))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened a picture"))
    monkeypatch.setattr(type(TOKENIZER), "encode_batch", lambda *_: pytest.fail("tokenised again"))
    second = open_shards(shard)
    for name in ("tokens", "labels", "first", "sizes", "before"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert len(list(tmp_path.iterdir())) == 3, "beside the shard: its index and the counts for this tokenizer"


def test_index_of_another_shard_is_refused(tmp_path) -> None:
    shard = write_tar(tmp_path / "a.tar", [captioned(0), captioned(1)])
    open_shards(shard)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1  # of the first header
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"its index was made for another file .* remove a\.tar\.\*\.idx"):
        open_shards(shard)
    write_tar(shard, [captioned(0), captioned(1), captioned(2)])
    with pytest.raises(ValueError, match=r"bytes, its index was made for .* remove a\.tar\.\*\.idx"):
        open_shards(shard)
    index_path(shard).unlink()
    with pytest.raises(ValueError, match=r"captions-\w+\.idx: not counts of captions \(made for another shard\)"):
        open_shards(shard)
    for stale in tmp_path.glob("*.captions-*.idx"):
        stale.unlink()
    assert open_shards(shard).num_samples == 3
    index = PictureIndex.load(index_path(shard))
    index.images[0, 0] = 10**9 // 512 * 512
    index.save(index_path(shard))
    with pytest.raises(ValueError, match="a member lies outside the tar"):
        open_shards(shard)
    index_path(shard).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not an image index .* remove it"):
        open_shards(shard)


def test_shard_that_is_no_whole_tar(tmp_path) -> None:
    shard = write_tar(tmp_path / "a.tar", [captioned(number) for number in range(20)])
    shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(ValueError, match="truncated or not a tar"):
        open_shards(shard)
    with pytest.raises(ValueError, match="holds no sample"):
        open_shards(write_tar(tmp_path / "b.tar", [{"__key__": "a", "tokens": b"1234"}]))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_shards(tmp_path / "c.tar")


def test_unusable_samples_are_counted_once_with_shard_and_key(tmp_path, capsys) -> None:
    image = encoded(picture(8, 8))
    bad = [
        ({"png": b"no picture"}, "no JPEG, PNG, WebP or GIF"),
        ({"png": image, "txt": b"\xff\xfe"}, "caption is not UTF-8 (invalid start byte at byte 0)"),
        ({"png": image, "txt": "", "json": b"{"}, "json: Expecting property name"),
        ({"png": image, "txt": None, "json": [1]}, "json: holds list, not a table"),
        ({"png": image, "txt": None, "json": {"caption": 5}}, "no caption"),
        ({"png": encoded(picture(30, 40))}, "40 x 30 = 1200 pixels, max_pixels is 1000"),
        ({"jpg": image, "png": image}, "two pictures with the number none"),
        ({"x.png": image}, "picture numbered 'x'"),
    ]
    samples = []
    for number, (members, _) in enumerate(bad):
        members = {"__key__": f"bad{number}", "txt": "a dog"} | members
        samples += [{name: value for name, value in members.items() if value is not None}, captioned(number)]
    shard = write_tar(tmp_path / "a.tar", samples)
    skip = Skip()
    for _ in range(2):
        dataset = open_shards(shard, on_problem=skip, max_pixels=1000)
    assert [dataset.key(sample) for sample in range(dataset.num_samples)] == [f"{n:06d}" for n in range(len(bad))]
    assert skip.num_skipped == len(bad) and skip.counts == {str(shard): len(bad)}
    said = capsys.readouterr().err
    for number, (_, why) in enumerate(bad):
        assert said.count(f"skipped: {shard}: sample 'bad{number}': {why}") == 1
    with pytest.raises(ValueError, match=r"a\.tar: sample 'bad\d': .*; mend or remove it, or skip such samples"):
        open_shards(shard, max_pixels=1000)


def test_broken_picture_is_told_with_its_place(tmp_path) -> None:
    whole = encoded(picture(64, 64), "JPEG")
    shard = write_tar(tmp_path / "a.tar", [{"__key__": "k", "jpg": whole[:-200], "txt": "a dog"}])
    dataset = open_shards(shard)
    form = PictureForm(patch=8, image_token=1, size=32)
    with pytest.raises(ValueError, match="truncated") as caught:
        dataset.pixels(0, 0, (4, 4), form)
    with pytest.raises(ValueError, match=r"a\.tar: sample 'k': .*truncated"):
        dataset.report(0, caught.value)


def test_names_of_other_tar_writers(tmp_path) -> None:
    """Long and foreign names stand in extended headers; hidden files and links are no samples."""
    shard = tmp_path / "a.tar"
    names = ["x" * 80 + "/" + "y" * 90, "\u00fcber", "./a/b"]
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in [*names, "._hidden"]:
            for extension, data in (("png", encoded(picture(8, 8))), ("json", json.dumps({"caption": "a"}).encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for _ in range(2):
        dataset = open_shards(shard)
        assert [dataset.key(sample) for sample in range(dataset.num_samples)] == names

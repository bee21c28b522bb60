"""The doctor and image-text shards."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.images.index import PictureIndex, index_path, scan_pictures
from tests.data_pipeline.doctor_shards import examine, found, write_corpus
from tests.data_pipeline.images import captioned, encoded, picture, write_tar

NAME = "train-00001.tar"


def clean(number: int) -> dict[str, Any]:
    return captioned(number, 24, 32, caption=f"picture number {number}")


def write_shards(folder: Path, samples: list[dict[str, Any]] | None = None) -> Path:
    """Two shards with their indexes; ``samples`` stand in the second one, beside clean ones."""
    for shard, numbers in enumerate((range(5), range(5, 10))):
        more = samples if samples and shard == 1 else []
        path = write_tar(folder / f"train-{shard:05d}.tar", [*map(clean, numbers), *more])
        scan_pictures(path).save(index_path(path))
    return folder


def test_clean_pictures_have_no_finding(tmp_path) -> None:
    diagnosis = examine(write_shards(tmp_path), readers=2)
    assert found(diagnosis) == []
    first, second = (shard.pictures for shard in diagnosis.shards)
    assert len(first.keys) == 5 and second.decoded == 5 and second.sizes[:, 1:].tolist() == [[24, 32]] * 5
    assert second.caption_bytes.tolist() == [len("picture number 5")] * 5


def sample(key: str, **members: Any) -> dict[str, Any]:
    return {"__key__": key, **members}


PNG = encoded(picture(24, 32, 77))
JPEG = encoded(picture(64, 64, 78), "JPEG")


@pytest.mark.parametrize(
    ("code", "spoilt"),
    [
        ("caption-missing", sample("bad", png=PNG)),
        ("caption-empty", sample("bad", png=PNG, txt=" \n")),
        ("caption-broken", sample("bad", png=PNG, txt=b"\xff\xfe")),
        ("caption-places", sample("bad", png=PNG, txt="<image> and <image>")),
        ("caption-places", sample("bad", **{"0.png": PNG, "1.png": JPEG}, txt="no place at all")),
        ("sample", sample("bad", png=b"nothing", txt="a cat")),
        ("sample", sample("bad", png=PNG, json=b"{", txt="a cat")),
        ("picture-broken", sample("bad", jpg=JPEG[:-300], txt="a cat")),
        ("picture-large", sample("bad", png=encoded(picture(24, 32).convert("1").resize((9000, 6000))), txt="a cat")),
        ("picture-tiny", sample("bad", png=encoded(picture(8, 32, 79)), txt="a cat")),
        ("picture-thin", sample("bad", png=encoded(picture(20, 200, 79)), txt="a cat")),
    ],
)
def test_spoilt_sample(tmp_path, code, spoilt) -> None:
    assert found(examine(write_shards(tmp_path, [spoilt]))) == [(code, NAME, "bad")]


def test_two_pictures_and_two_captions_that_are_the_same(tmp_path) -> None:
    copy = sample("copy", png=clean(2)["png"], txt="another text")
    same = sample("same", png=PNG, txt="picture number 3 ")
    diagnosis = examine(write_shards(tmp_path, [copy, same]))
    assert found(diagnosis) == [("picture-duplicate", "train-00000.tar", "000002"), ("caption-duplicate", "", "")]
    pictures, captions = (finding.what for finding in diagnosis.findings.in_order())
    assert f"{NAME} 'copy'" in pictures
    assert captions.startswith("2 of 12 captions") and "2 times 'picture number 3'" in captions


def test_keys_of_pictures_that_come_twice(tmp_path) -> None:
    folder = write_shards(tmp_path, [sample("000006", jpg=JPEG)])
    assert ("duplicate-key", NAME, "000006") in found(examine(folder))
    write_tar(folder / "train-00002.tar", [sample("000001", png=PNG, txt="a cat")])
    assert ("duplicate-key-across", "train-00000.tar", "000001") in found(examine(folder))


def wrong_places(shard: Path) -> None:
    index = PictureIndex.load(index_path(shard))
    images = index.images.copy()
    images[1, 0] += 512
    dataclasses.replace(index, images=images).save(index_path(shard))


@pytest.mark.parametrize(
    ("spoil", "code", "samples"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:4000]), "torn", 5),
        (lambda shard: index_path(shard).unlink(), "index-missing", 10),
        (lambda shard: index_path(shard).write_bytes(b"?"), "index-broken", 10),
        (wrong_places, "index-mismatch", 10),
    ],
)
def test_spoilt_shard_or_index(tmp_path, spoil, code, samples) -> None:
    folder = write_shards(tmp_path)
    spoil(folder / NAME)
    diagnosis = examine(folder)
    assert found(diagnosis) == [(code, NAME, "")]
    assert sum(len(shard.pictures.keys) for shard in diagnosis.shards if shard.pictures is not None) == samples


def test_index_of_another_file_of_the_same_size(tmp_path) -> None:
    folder = write_shards(tmp_path)
    index = PictureIndex.load(index_path(folder / NAME))
    dataclasses.replace(index, ends=index.ends[::-1]).save(index_path(folder / NAME))
    assert found(examine(folder)) == [("index-mismatch", NAME, "")]


def test_text_and_pictures_together(tmp_path) -> None:
    """Folders of both: each is examined as what it is, and pictures need no tokenizer."""
    diagnosis = examine(write_corpus(tmp_path / "text"), write_shards(tmp_path / "pictures"))
    assert found(diagnosis) == []
    assert np.count_nonzero([shard.pictures is not None for shard in diagnosis.shards]) == 2

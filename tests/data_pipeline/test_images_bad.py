"""Bad and odd input, from the tar to the row: read rightly, left out with its reason, or refused in one line."""

import io
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.problems import Problem, Skip, fatal
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.pack import IGNORED
from tests.data_pipeline.images import captioned, encoded, picture, small_tokenizer, write_tar

TOKENIZER = small_tokenizer()
PATCH, SIZE = 4, 8
FORM = PictureForm(patch=PATCH, image_token=7, size=SIZE)
NATIVE = PictureForm(patch=PATCH, image_token=7, resize="native", max_patches=16)


def open_rows(
    shard: Path,
    form: PictureForm = FORM,
    *,
    on_problem: Callable[[Problem], None] = fatal,
    workers: int = 0,
    **more: Any,
) -> ImageTextStream:
    dataset = ImageTextDataset(shard, TOKENIZER, on_problem=on_problem, progress=False)
    budgets = {"seq_len": 64, "patches": 32} | more
    return ImageTextStream(dataset, form, shuffle=False, workers=workers, **budgets)


def only_picture(tmp_path: Path, data: bytes, form: PictureForm = FORM, kind: str = "png") -> np.ndarray:
    """The values [patches, channel, pixel] of the one picture of a shard."""
    shard = write_tar(tmp_path / "a.tar", [{"__key__": "k", kind: data, "txt": "a dog"}])
    row = open_rows(shard, form).read(0, 1)
    return row.patches[0][row.images[0] == 0].reshape(-1, 3, PATCH**2)


def png(width: int, height: int, idat: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG whose header may lie."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", idat), (b"IEND", b"")]
    crc = [struct.pack(">I", zlib.crc32(name + data)) for name, data in parts]
    body = (struct.pack(">I", len(d)) + name + d + end for (name, d), end in zip(parts, crc, strict=True))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_jpeg_leaves_its_row_without_it_and_all_others_alike(tmp_path, workers) -> None:
    samples = [captioned(number) for number in range(12)]
    samples += [{"__key__": "torn", "jpg": encoded(picture(64, 64), "JPEG")[:-300], "txt": "a cat"}]
    samples += [captioned(number) for number in range(20, 24)]
    skip = Skip()
    stream = open_rows(write_tar(tmp_path / "a.tar", samples), on_problem=skip, workers=workers)
    torn = 12
    count = stream.num_samples
    holding = [number for number, row in enumerate(stream.rows(0, count)) if torn in row]
    read = stream.read(0, count)
    assert skip.num_skipped == 1 and len(holding) == 1
    for number, row in enumerate(stream.rows(0, count)):
        held = len(row) - (number in holding)
        assert read.documents[number].max() == read.images[number].max() == held - 1
        texts = [stream.dataset.texts([sample])[0][-1] for sample in row.tolist() if sample != torn]
        expected = np.concatenate([np.r_[text, TOKENIZER.eos_id] for text in texts])
        kept = (read.spans[number] < 0) & (read.documents[number] >= 0)
        assert read.tokens[number, :-1][kept].tolist() == expected.tolist()
        assert (read.targets[number][read.documents[number] < 0] == IGNORED).all()
    again = stream.read(0, count)
    assert all(np.array_equal(old, new) for old, new in zip(read, again, strict=True)) and skip.num_skipped == 1
    stream.close()


def test_policy_fatal_names_shard_key_and_reason(tmp_path) -> None:
    torn = {"__key__": "some/torn", "jpg": encoded(picture(64, 64), "JPEG")[:-300], "txt": "a cat"}
    shard = write_tar(tmp_path / "a.tar", [captioned(0), torn])
    with pytest.raises(ValueError, match=r"a\.tar: sample 'some/torn': .*truncated.*; mend or remove it") as caught:
        open_rows(shard).read(0, 1)
    assert "\n" not in str(caught.value)


def test_shard_of_broken_pictures_alone_gives_empty_rows(tmp_path) -> None:
    torn = [{"__key__": str(n), "jpg": encoded(picture(64, 64), "JPEG")[:-300], "txt": "a"} for n in range(3)]
    read = open_rows(write_tar(tmp_path / "a.tar", torn), on_problem=Skip()).read(0, 1)
    assert (read.documents == -1).all() and (read.images == -1).all() and (read.targets == IGNORED).all()


def test_cmyk(tmp_path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    values = only_picture(tmp_path, encoded(ink, "JPEG", quality=95), kind="jpg")
    assert (values[:, 0] > 240).all() and (values[:, 1:] < 15).all()


def test_grey_of_16_bits(tmp_path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    values = only_picture(tmp_path, encoded(Image.fromarray(ramp)))
    assert (values[:, 0] == values[:, 1]).all() and (values[:, 0] == values[:, 2]).all()
    rows = values[:, 0].reshape(2, 2, PATCH, PATCH).swapaxes(1, 2).reshape(8, 8)
    assert np.abs(rows.astype(int) - (ramp >> 8)).max() <= 1


def test_animated_gif_is_its_first_frame(tmp_path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("#0000ff", "#00ff00", "#ff0000")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    for kind in ("gif", "png"):  # the bytes tell, not the name
        values = only_picture(tmp_path / kind, data, kind=kind)
        assert (values[:, 2] == 255).all() and (values[:, :2] == 0).all()


@pytest.mark.parametrize("form", [FORM, NATIVE, PictureForm(patch=PATCH, image_token=7, resize="squash", size=SIZE)])
@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_tiny_and_thin_pictures(tmp_path, form, size) -> None:
    values = only_picture(tmp_path, encoded(Image.new("RGB", size, (10, 200, 30))), form)
    assert 1 <= len(values) <= form.fullest
    assert (values == np.array([10, 200, 30])[:, None]).all()
    if form is NATIVE:
        assert len(values) == (1 if size == (1, 1) else 16), (
            "a thin picture is one row of patches, as long as it may be"
        )


def test_zip_bombs_are_seen_in_the_header(tmp_path) -> None:
    bombs = {
        "wide": png(60_000, 60_000, zlib.compress(bytes(1 << 24), 9)),
        "huge": png(2**31 - 1, 2**31 - 1, b""),
    }
    samples = [{"__key__": key, "png": data, "txt": "a dog"} for key, data in bombs.items()]
    skip = Skip()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = open_rows(write_tar(tmp_path / "a.tar", [*samples, captioned(0)]), on_problem=skip)
    assert skip.num_skipped == 2 and stream.dataset.num_samples == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB: nothing was unpacked"
    with pytest.raises(ValueError, match=r"a\.tar: sample '(wide|huge)': .*pixels"):
        open_rows(tmp_path / "a.tar")


def test_bombs_behind_an_honest_header(tmp_path) -> None:
    """64 MiB of pixels where 8 x 8 belong, and a comment of 64 MiB: neither may be unpacked whole."""
    packed = zlib.compress(bytes(1 << 26), 9)
    samples = [
        {"__key__": "pixels", "png": png(8, 8, packed), "txt": "a dog"},
        {
            "__key__": "comment",
            "png": png(8, 8, zlib.compress(bytes(72)), (b"zTXt", b"a\0\0" + packed)),
            "txt": "a dog",
        },
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skip = Skip()
    shard = write_tar(tmp_path / "a.tar", [*samples, captioned(0)])
    read = open_rows(shard, on_problem=skip).read(0, 1)
    assert read.documents.max() + 1 == 3 - skip.num_skipped
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


def test_captions_missing_and_empty_are_left_out_with_the_reason(tmp_path, capsys) -> None:
    image = encoded(picture(8, 8))
    bad = {"none": {}, "empty": {"txt": ""}, "blank": {"txt": " \n\t"}, "null": {"json": {"caption": None}}}
    samples = [{"__key__": key, "png": image, **members} for key, members in bad.items()]
    stream = open_rows(write_tar(tmp_path / "a.tar", [*samples, captioned(0)]), on_problem=Skip())
    assert stream.dataset.num_samples == 1
    said = capsys.readouterr().err
    for key, why in {"none": "no caption", "empty": "caption is empty", "blank": "empty", "null": "no caption"}.items():
        assert any(f"sample '{key}'" in line and why in line for line in said.splitlines()), key


def test_caption_of_a_megabyte_is_cut_to_the_row(tmp_path) -> None:
    long = "a handwritten seven " * 50_000
    shard = write_tar(tmp_path / "a.tar", [captioned(0, caption=long), captioned(1)])
    stream = open_rows(shard)
    assert stream.num_cut == 1 and stream.dataset.tokens[0] > 100_000
    rows = stream.rows(0, stream.num_samples)
    place = next(number for number, row in enumerate(rows) if 0 in row)
    read = stream.read(place, 1)
    assert (read.documents[0] == 0).all(), "nothing else has room"
    pictures = int((read.spans[0] >= 0).sum())
    assert read.tokens[0, pictures:64].tolist() == TOKENIZER.encode(long[:2000])[: 64 - pictures].tolist()
    assert TOKENIZER.eos_id not in read.tokens[0, :64], "a text that goes on does not end here"
    pairs = PairStream(stream.dataset, FORM, seq_len=16, shuffle=False).read(0, 1)
    assert pairs.tokens[0, 15] == TOKENIZER.eos_id and (pairs.documents[0] == 0).all()


def test_placeholders_that_do_not_match_the_pictures(tmp_path, capsys) -> None:
    image = encoded(picture(8, 8))
    samples = [
        {"__key__": "few", "0.png": image, "1.png": image, "txt": "one <image> only"},
        {"__key__": "many", "0.png": image, "txt": "<image> and <image>"},
        {"__key__": "no", "0.png": image, "1.png": image, "txt": "none at all"},
        {"__key__": "good", "0.png": image, "1.png": image, "txt": "<image> and <image>"},
    ]
    stream = open_rows(write_tar(tmp_path / "a.tar", samples), on_problem=Skip())
    assert stream.dataset.num_samples == 1 and stream.dataset.key(0) == "good"
    said = capsys.readouterr().err
    for key, number, pictures in (("few", 1, 2), ("many", 2, 1), ("no", 0, 2)):
        assert f"sample '{key}': {number} placeholders <image> for {pictures} pictures" in said


def test_pictures_beyond_the_budget(tmp_path) -> None:
    shard = write_tar(tmp_path / "a.tar", [captioned(number, 64, 64) for number in range(3)])
    with pytest.raises(ValueError, match="of up to 16 patches and 16 tokens do not fit rows of 8 patches") as caught:
        open_rows(shard, NATIVE, patches=8)
    assert "\n" not in str(caught.value) and "lower max_patches" in str(caught.value)
    with pytest.raises(ValueError, match=r"do not fit rows of 32 patches .* and 16 tokens with text after them"):
        open_rows(shard, NATIVE, seq_len=16)
    image = encoded(picture(64, 64))
    many = {
        "__key__": "many",
        **{f"{n}.png": image for n in range(4)},
        "txt": "a <image> b <image> c <image> d <image> e",
    }
    stream = open_rows(write_tar(tmp_path / "b.tar", [many]), NATIVE)
    read = stream.read(0, 1)
    assert stream.num_cut == 1 and read.images.max() == 1, "two of four fit 32 patches, and none in part"
    kept = read.tokens[0, :64][(read.documents[0] == 0) & (read.spans[0] < 0)]
    expected = np.concatenate(stream.dataset.texts([0])[0][:3])
    assert kept.tolist() == expected.tolist(), "the document ends before the third picture"


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/etc/up.png", "..\\up.png", "a/.."])
def test_members_that_lead_out_of_the_tar(tmp_path, name) -> None:
    shard = write_tar(tmp_path / "a.tar", [captioned(0)])
    data = encoded(picture(8, 8))
    with tarfile.open(shard, "a") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"a\.tar: member .* refused") as caught:
        open_rows(shard)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"], "nothing extracted, no index kept"

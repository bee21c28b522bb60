"""Decoding against Pillow's own operations."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.images import decode as module
from data_pipeline.images.decode import PictureError, decode, picture_size
from tests.data_pipeline.images import encoded, picture


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (40, 40), (7, 90), (1, 1)])
def test_crop_and_squash_are_pillows(size) -> None:
    image = picture(*size)
    data = encoded(image)
    cropped = ImageOps.fit(image, (24, 16), Image.Resampling.BICUBIC)
    assert np.abs(decode(data, 16, 24, crop=True).astype(int) - np.asarray(cropped)).max() <= 1
    squashed = image.resize((24, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(data, 16, 24, crop=False), np.asarray(squashed))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(turn, kind) -> None:
    exif = Image.Exif()
    exif[module.ORIENTATION] = turn
    data = encoded(picture(24, 40), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width = picture_size(io.BytesIO(data))
    assert (width, height) == upright.size
    assert np.array_equal(decode(data, height, width, crop=True), np.asarray(upright))


def test_kinds_of_colour() -> None:
    for mode in ("L", "P", "1", "CMYK", "RGBA", "LA"):
        image = picture(16, 16, mode=mode if mode not in ("P", "LA") else "RGB").convert(mode)
        kind = "JPEG" if mode == "CMYK" else "PNG"
        data = encoded(image, kind)
        with Image.open(io.BytesIO(data)) as stored:
            expected = np.asarray(stored.convert("RGB"))
        assert np.array_equal(decode(data, 16, 16, crop=False), expected), mode
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = decode(encoded(Image.fromarray(deep)), 16, 16, crop=False)
    assert np.array_equal(found, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1)), "not clipped to white"


def test_transparency_stands_on_white_and_animations_on_their_first_frame() -> None:
    glass = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (decode(encoded(glass), 8, 8, crop=False) == 255).all()
    palette = Image.new("P", (8, 8), 3)
    assert (decode(encoded(palette, "GIF", transparency=3), 8, 8, crop=False) == 255).all()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(moving, 8, 8, crop=False)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("stored", "wanted", "crop", "mean"),
    [((256, 256), (224, 224), True, 4), ((600, 400), (224, 224), True, 4), ((512, 512), (64, 64), False, 4),
     ((100, 100), (224, 224), True, 0.01), ((90, 60), (90, 60), False, 0.01)],
)  # fmt: skip
def test_reduced_scale_gives_nearly_the_same_pixels(monkeypatch, fast, stored, wanted, crop, mean) -> None:
    if fast and module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    if not fast:
        monkeypatch.setattr(module, "simplejpeg", None)
    data = encoded(picture(*stored), "JPEG", quality=90)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    size = wanted[::-1]
    kept = ImageOps.fit(whole, size, Image.Resampling.BICUBIC) if crop else whole.resize(size, Image.Resampling.BICUBIC)
    found = decode(data, *wanted, crop=crop)
    difference = np.abs(found.astype(int) - np.asarray(kept))
    assert found.shape == (*wanted, 3) and difference.mean() < mean


@pytest.mark.parametrize(
    ("stored", "wanted", "crop", "eighths", "halves"),
    [
        ((512, 256), (64, 64), True, (128, 64), (128, 64)),
        ((256, 256), (224, 224), True, (224, 224), (256, 256)),
        ((512, 512), (130, 60), False, (192, 192), (256, 256)),
        ((64, 64), (100, 100), True, (64, 64), (64, 64)),
    ],
)
def test_jpegs_are_decoded_at_the_smallest_scale_that_covers(stored, wanted, crop, eighths, halves) -> None:
    data = encoded(picture(*stored), "JPEG")
    image = Image.open(io.BytesIO(data))
    needed = module._needed(image.size, wanted, crop)
    if module.simplejpeg is not None:
        assert module._fast(image, data, needed).shape[:2] == eighths
    assert module._pillow(image, needed).size == halves[::-1]


def test_limits_are_seen_before_decoding(monkeypatch) -> None:
    data = encoded(picture(50, 40))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="40 x 50 = 2000 pixels, max_pixels is 1999"):
        decode(data, 8, 8, crop=True, max_pixels=1999)
    with pytest.raises(PictureError, match="bytes, max_bytes is 10"):
        decode(data, 8, 8, crop=True, max_bytes=10)
    assert picture_size(io.BytesIO(data)) == (50, 40)


def test_no_picture() -> None:
    for data in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(PictureError, match="no JPEG, PNG, WebP or GIF"):
            decode(data, 8, 8, crop=True)
        with pytest.raises(PictureError, match="no JPEG, PNG, WebP or GIF"):
            picture_size(io.BytesIO(data))

"""Pictures: their size from the header alone, and decoded to RGB of a wanted size, however they are stored.

JPEGs are decoded at a reduced scale that still covers what is wanted: in eighths by libjpeg-turbo where ``simplejpeg``
is installed, else in halves by Pillow. The two differ by less than 4 of 255 in the mean where the scale differs, and
not at all where it does not.
"""

import io
import math
from typing import IO

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # optional: Pillow decodes the same files
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000


class PictureError(ValueError):
    """A picture or its text cannot be used; the message says why, not where."""


def check_limits(num_bytes: int, width: int, height: int, max_pixels: int, max_bytes: int) -> None:
    """Raise PictureError for a picture that is too large to be decoded."""
    if num_bytes > max_bytes:
        raise PictureError(f"{num_bytes} bytes, max_bytes is {max_bytes}")
    if width * height > max_pixels:
        raise PictureError(f"{width} x {height} = {width * height} pixels, max_pixels is {max_pixels}")


def picture_size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width as seen (turned by EXIF), from the header. Raises PictureError when there is none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = _turn(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead to
        raise PictureError(_reason(error)) from error


def decode(
    data: bytes, height: int, width: int, *, crop: bool, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> np.ndarray:
    """A picture as RGB uint8 [height, width, 3]; of an animation the first frame; transparency over white.

    Args:
        crop: keep the aspect and cut out the middle; else each side is scaled by itself.

    Raises:
        PictureError: too large (seen before anything is decoded), truncated, or no JPEG, PNG, WebP or GIF.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_limits(len(data), image.width, image.height, max_pixels, max_bytes)
            turn = _turn(image)
            stored = (width, height) if turn >= 5 else (height, width)
            needed = _needed(image.size, stored, crop)
            pixels = _fast(image, data, needed)
            if pixels is not None and pixels.shape[:2] == stored and turn == 1:
                return pixels
            rgb = _pillow(image, needed) if pixels is None else Image.fromarray(pixels)
            rgb = rgb.resize(stored[::-1], Image.Resampling.BICUBIC, box=_box(rgb.size, stored, crop))
            if turn in TURNS:
                rgb = rgb.transpose(TURNS[turn])
            return np.asarray(rgb)
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # as above
        raise PictureError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "no JPEG, PNG, WebP or GIF" if "cannot identify" in text else f"{text or type(error).__name__}"


def _turn(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Not `Image.getexif`: it decodes a whole PNG in search of one at its end."""
    stored = image.info.get("exif")
    if not stored:
        return 1
    exif = Image.Exif()
    try:
        exif.load(stored)
        turn = exif.get(ORIENTATION, 1)
    except Exception:  # unreadable notes about a picture do not spoil it
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _needed(size: tuple[int, int], wanted: tuple[int, int], crop: bool) -> tuple[int, int]:
    """Height and width that a whole picture of ``size`` (width, height) must have, to make ``wanted`` of it without
    enlarging.
    """
    left, top, right, bottom = _box(size, wanted, crop)
    rows, columns = size[1] * wanted[0] / (bottom - top), size[0] * wanted[1] / (right - left)
    return math.ceil(rows - 1e-6), math.ceil(columns - 1e-6)


def _fast(image: Image.Image, data: bytes, needed: tuple[int, int]) -> np.ndarray | None:
    """A JPEG by libjpeg-turbo, at the smallest of its scales that gives what is needed; None: Pillow has to decide."""
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, min_height=needed[0], min_width=needed[1])
    except ValueError:
        return None  # broken or not is for Pillow to say, with and without simplejpeg


def _pillow(image: Image.Image, needed: tuple[int, int]) -> Image.Image:
    image.draft(None, needed[::-1])  # of use with JPEGs alone
    return _rgb(image)


def _box(size: tuple[int, int], wanted: tuple[int, int], crop: bool) -> tuple[float, float, float, float]:
    """What of a picture of ``size`` (width, height) goes to ``wanted`` (height, width): left, top, right, bottom."""
    width, height = size
    if not crop:
        return 0, 0, width, height
    scale = min(width / wanted[1], height / wanted[0])
    left, top = (width - wanted[1] * scale) / 2, (height - wanted[0] * scale) / 2
    return max(left, 0), max(top, 0), min(width - left, width), min(height - top, height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")

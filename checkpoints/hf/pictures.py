"""What becomes of a picture before a model sees it: `[data.pictures]` of a recipe, as image processors say it."""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from checkpoints.hf.brand import Config, misfit
from checkpoints.hf.quiet import quiet
from checkpoints.hf.tokenizer import has_tokenizer, load_tokenizer

NEWLINE = "|NEWLINE|"  # what a FuyuProcessor puts after each row of patches
LARGEST = {"height": 1080, "width": 1920}  # pixels that a FuyuImageProcessor leaves as they are


@dataclass(frozen=True)
class PictureSteps:
    """resize: "crop", the shorter side to `side` pixels and the middle of the longer; "squash", both sides; "native",
    near a picture's own size, at most `max_patches` patches. newline: token after each row of patches, -1 for none.
    """

    resize: str
    side: int = 0
    max_patches: int = 0
    newline: int = -1

    def in_recipe(self) -> Config:
        """As `[data.pictures]` of a run that is imported; the side is the tower's."""
        return {"resize": self.resize, "max_patches": self.max_patches, "newline": self.newline}


def read_steps(folder: Path, patch: int) -> PictureSteps:
    """What transformers makes of a folder's image processor. patch: pixels of a patch's side.

    Raises ValueError for one that transformers refuses, or that does something else.
    """
    from transformers import AutoImageProcessor  # imports slowly

    try:
        with quiet():
            images: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # many types
        why = shorten(str(error), 200)  # it may list all that there are
        raise ValueError(f"{folder}: transformers cannot load its image processor: {why}") from error
    if type(images).__name__.startswith("Fuyu"):
        newline = load_tokenizer(folder).get_vocab().get(NEWLINE, -1) if has_tokenizer(folder) else -1
        return PictureSteps("native", max_patches=_patches(_size(images.size), patch), newline=newline)
    where, size = f"{folder}: cannot import image_processor", _size(images.size)
    if not images.do_resize:
        raise ValueError(f"{where}.{misfit('do_resize', images.do_resize, [True])}")
    if getattr(images, "do_pad", None):
        raise ValueError(f"{where}.{misfit('do_pad', images.do_pad, [False])}")
    if not getattr(images, "do_center_crop", None):
        # One that keeps the aspect gives a tower what it takes of squares alone: these are the same squashed.
        return PictureSteps("squash", next(iter(size.values())))
    cropped = _size(images.crop_size)
    side = cropped["height"]
    if {*cropped.values(), *size.values()} != {side}:
        raise ValueError(f"{where}.{misfit('size', size, [f'that of crop_size, {side}'])}")
    return PictureSteps("crop" if "shortest_edge" in size else "squash", side)


def square(resize: str, side: int) -> Config:
    """An image processor that gives squares of `side` pixels, by "crop" or by "squash"."""
    images: Config = {"do_convert_rgb": True, "do_resize": True, "resample": 3}  # bicubic
    images |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    both: Config = {"height": side, "width": side}
    if resize == "squash":
        return {**images, "image_processor_type": "SiglipImageProcessor", "size": both}
    crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": both}
    return {**images, "image_processor_type": "CLIPImageProcessor", **crop}


def check_square(steps: PictureSteps, side: int, processor: str) -> None:
    """Raises ValueError unless `square` does these steps. side: what the model takes."""
    if steps.resize not in ("crop", "squash"):
        raise ValueError(
            f'data.pictures.resize = "{steps.resize}": the exported model takes squares of {side} pixels; train with '
            '"crop" or "squash" to export'
        )
    if steps.side != side:
        raise ValueError(
            f"data.pictures.size = {steps.side}: the exported model takes squares of {side} pixels alone; train with "
            f"data.pictures.size = {side} to export"
        )
    if processor == "LlavaProcessor" and steps.newline >= 0:
        raise ValueError(
            f"data.pictures.newline = {steps.newline}: a {processor} puts no token after a row of patches; train with "
            "data.pictures.newline = -1 to export"
        )


def fuyu_size(steps: PictureSteps, images: Config) -> Config:
    """The `size` of a FuyuImageProcessor that leaves pictures at most as many patches as the steps do.

    images: what is known of it. Raises ValueError for steps that are not its own.
    """
    if steps.resize != "native":
        raise ValueError(
            f'data.pictures.resize = "{steps.resize}": a FuyuProcessor leaves pictures near their own size and aspect; '
            'train with "native" to export'
        )
    size, patch = images.get("size", LARGEST), images["patch_size"]["height"]
    if _patches(size, patch) == steps.max_patches:
        return dict(size)
    side = math.isqrt(steps.max_patches) * patch
    return {"height": side, "width": side}


def check_newline(steps: PictureSteps, folder: Path) -> None:
    """Raises ValueError unless a FuyuProcessor with the folder's tokenizer puts these steps' token after each row."""
    token = load_tokenizer(folder).get_vocab().get(NEWLINE)
    if token is None:
        raise ValueError(
            f"tokenizer: it lacks {NEWLINE!r}, which a FuyuProcessor puts after each row of patches; move the run's "
            "tokenizer folder away to export without it"
        )
    if steps.newline != token:
        raise ValueError(
            f"data.pictures.newline = {steps.newline}: a FuyuProcessor puts {NEWLINE!r}, token {token}, after each row "
            f"of patches; train with data.pictures.newline = {token} to export"
        )


def _size(size: Any) -> Config:
    """Of what transformers has for one, the sides that it states."""
    return {key: value for key, value in dict(size).items() if value is not None}


def _patches(size: Config, patch: int) -> int:
    return int((size["height"] // patch) * (size["width"] // patch))

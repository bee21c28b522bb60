"""Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, as captioned pictures: a real task that needs no download."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.images.write import CLASSES, ImageText, split_of, write_image_shards
from data_pipeline.paths import write_atomic
from data_pipeline.tokenizer import train_tokenizer

try:
    from sklearn.datasets import load_digits
except ImportError:  # only this corpus needs it
    load_digits = None

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION = "a handwritten {name}"
HELD_OUT = 0.2
BRIGHTEST = 16  # of the data set's values, which begin at 0
VOCAB_SIZE = 320  # 256 bytes, a few special tokens, and the captions' words


def write_digits(folder: str | Path, *, shard_samples: int = 500) -> dict[str, int]:
    """Write ``train-*.tar``, ``heldout-*.tar``, ``classes.json`` and a tokenizer of the captions into ``folder``.

    A sample is a grey PNG, "a handwritten seven", and a json with its label. About a fifth is held out, always the
    same ones.

    Returns:
        samples of each split.

    Raises:
        ValueError: scikit-learn is not installed, or the folder has such shards.
    """
    if load_digits is None:
        raise ValueError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    folder = Path(folder)
    splits: dict[str, list[ImageText]] = {"train": [], "heldout": []}
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        key = f"digit-{number:04d}"
        facts = {"label": label, "class": NAMES[label]}
        text = CAPTION.replace("{name}", NAMES[label])
        splits[split_of(key, HELD_OUT)].append(ImageText(key, [("png", _png(pixels))], text, facts))
    for split, samples in splits.items():
        write_image_shards(samples, folder, name=split, shard_samples=shard_samples)
    write_atomic(folder / CLASSES, json.dumps(NAMES, indent=2).encode() + b"\n")
    captions = [sample.text for sample in splits["train"]]
    train_tokenizer(captions, vocab_size=VOCAB_SIZE).save(folder / "tokenizer")
    return {split: len(samples) for split, samples in splits.items()}


def _png(pixels: np.ndarray) -> bytes:
    """Values [8, 8] from 0 to 16 as a grey PNG."""
    file = io.BytesIO()
    Image.fromarray(np.rint(pixels * (255 / BRIGHTEST)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()

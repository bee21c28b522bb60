"""Small image-text shards with known contents, made by webdataset's own writer."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.tokenizer import Tokenizer, train_tokenizer

WORDS = ("a", "handwritten", "seven", "zero", "one", "two", "three", "four", "of", "picture", "dog", "cat", "tree")


def small_tokenizer() -> Tokenizer:
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 12)) for i in range(200)]
    return train_tokenizer(texts, vocab_size=300)


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with a little noise, as photographs have."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + draw.integers(-4, 5, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[dict[str, Any]]) -> Path:
    """Samples of ``__key__`` and members by extension: bytes, str (.txt) or tables (.json)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def captioned(
    number: int, height: int = 12, width: int = 20, caption: str | None = None, **more: Any
) -> dict[str, Any]:
    """One PNG and its caption."""
    image = encoded(picture(height, width, number))
    text = caption or f"a {WORDS[number % len(WORDS)]} picture"
    return {"__key__": f"{number:06d}", "png": image, "txt": text, **more}

"""Captions as tokens: split at the places of pictures, and counted once for a tokenizer.

``SHARD.tar.captions-FINGERPRINT.idx`` holds, beside the shard, the counts that packing needs.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from data_pipeline.images.decode import PictureError
from data_pipeline.images.index import JSON, MAX_TEXT, PictureIndex, caption_of, read_json
from data_pipeline.paths import write_atomic
from data_pipeline.places import Shard
from data_pipeline.tokenizer import Tokenizer

TEXTS_AT_ONCE = 4096
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Captioning:
    """How text becomes tokens around pictures.

    placeholder: text that stands for the next picture of an interleaved document. image_first: where a caption that
    names no place has its one picture, before it or after it.
    """

    tokenizer: Tokenizer
    placeholder: str = "<image>"
    image_first: bool = True

    @property
    def fingerprint(self) -> str:
        """Equal where all captions give equal tokens at equal places."""
        facts = [FORMAT_VERSION, self.tokenizer.fingerprint, self.placeholder, self.image_first]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def split(self, blob: bytes, kind: int, num_images: int) -> list[str]:
        """The text before, between and after the pictures, num_images + 1 pieces. Raises PictureError when it does not
        fit them.
        """
        text = caption_text(blob, kind)
        pieces = text.split(self.placeholder)
        if len(pieces) == 1 and num_images == 1:
            pieces = ["", text] if self.image_first else [text, ""]
        if len(pieces) != num_images + 1:
            raise PictureError(f"{len(pieces) - 1} placeholders {self.placeholder} for {num_images} pictures")
        return pieces

    def tokens(self, texts: list[list[str]]) -> list[list[np.ndarray]]:
        """Ids of each piece of each text."""
        flat = self.tokenizer.encode_batch([piece for pieces in texts for piece in pieces])
        found = iter(flat)
        return [[next(found) for _ in pieces] for pieces in texts]


def caption_text(blob: bytes, kind: int) -> str:
    """The text of a .txt or .json member, without white space around it. Raises PictureError when there is none."""
    if kind == JSON:
        text = caption_of(read_json(blob))
        if text is None:
            raise PictureError("json: neither 'caption' nor 'text' is a string")
    elif len(blob) > MAX_TEXT:
        raise PictureError(f"caption of more than {MAX_TEXT} bytes")
    else:
        try:
            text = blob.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PictureError(f"caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    text = text.encode(errors="replace").decode().strip()  # json may hold halves of surrogate pairs
    if not text:
        raise PictureError("caption is empty")
    return text


@dataclass(frozen=True)
class CaptionCounts:
    """tokens int32 [n]: of each sample's text, -1 where it cannot be used; before int32 [m]: of the text before each
    picture; problems: sample and reason of each -1.
    """

    tokens: np.ndarray
    before: np.ndarray
    ends: str  # of the shard, as in its index
    problems: list[tuple[int, str]]

    def save(self, path: Path) -> None:
        blob = json.dumps({"ends": self.ends, "problems": self.problems})
        write_atomic(path, save_safetensors({"tokens": self.tokens, "before": self.before}, metadata={"counts": blob}))

    @classmethod
    def load(cls, path: Path, index: PictureIndex) -> Self:
        """Read the counts for the samples of ``index``. Raises ValueError when they are not."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["counts"])
                tokens, before = file.get_tensor("tokens"), file.get_tensor("before")
            lengths = (len(tokens), len(before))
            if lengths != (len(index.texts), len(index.images)) or facts["ends"] != index.ends:
                raise ValueError("made for another shard")
            return cls(tokens, before, index.ends, [(int(sample), str(why)) for sample, why in facts["problems"]])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not counts of captions ({error}); remove it and they are made again") from error


def count_captions(shard: Path, index: PictureIndex, captioning: Captioning) -> CaptionCounts:
    """Tokenise all captions of a shard once."""
    tokens = np.full(len(index.texts), -1, np.int32)
    before = np.zeros(len(index.images), np.int32)
    problems: list[tuple[int, str]] = []
    with shard.open("rb") as file:
        for begin in range(0, len(tokens), TEXTS_AT_ONCE):
            texts = {}
            for sample in range(begin, min(begin + TEXTS_AT_ONCE, len(tokens))):
                num_images = int(index.first[sample + 1] - index.first[sample])
                try:
                    texts[sample] = captioning.split(
                        _read(file, index.texts[sample]), int(index.kinds[sample]), num_images
                    )
                except PictureError as error:
                    problems.append((sample, str(error)))
            for sample, pieces in zip(texts, captioning.tokens(list(texts.values())), strict=True):
                ends = np.cumsum([len(piece) for piece in pieces])
                tokens[sample] = ends[-1]
                before[index.first[sample] : index.first[sample + 1]] = ends[:-1]
    return CaptionCounts(tokens, before, index.ends, problems)


def _read(file: IO[bytes], where: np.ndarray) -> bytes:
    file.seek(int(where[0]))
    return file.read(min(int(where[1]), MAX_TEXT + 1))


def load_counts(shard: Shard, index: PictureIndex, captioning: Captioning) -> CaptionCounts:
    """The counts of a shard's captions; where there are none they are made, and kept where they are looked for next
    time.
    """
    path = shard.beside(f".captions-{captioning.fingerprint[:16]}.idx")
    if path.is_file():
        return CaptionCounts.load(path, index)
    with shard.local(index) as file:
        counts = count_captions(file, index, captioning)
    if os.access(path.parent, os.W_OK):
        counts.save(path)
    return counts

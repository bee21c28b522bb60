"""Pictures and their classes: a row is one picture, and what its caption names is the row's one target."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.problems import Problem
from data_pipeline.pack import IGNORED, ImageSamples
from data_pipeline.tokenizer import Tokenizer


class ClassNames:
    """The classes as a vocabulary, in a tokenizer's place: a caption that is a class's name is one token, its number;
    any other text is several, and stays readable.

    Attributes:
        vocab_size: largest token + 1. eos_id: never a class.

    Raises:
        ValueError: a name comes twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name.strip() for name in names]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        if twice := sorted(name for name in self._numbers if self.names.count(name) > 1):
            raise ValueError(
                f"model.classes: {twice[0]!r} is there twice, and a caption could mean either; rename one of them"
            )
        self.eos_id = len(self.names)
        self.vocab_size = self.eos_id + 1 + 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Of each text: nothing, a class, or `eos_id` and its bytes."""
        return [np.array(self._encode(text.strip()), np.uint32) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        if text in self._numbers:
            return [self._numbers[text]]
        return [self.eos_id, *(self.eos_id + 1 + byte for byte in text.encode())]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens [n] of one text."""
        first = [int(token) for token in ids]
        if first and first[0] < self.eos_id:
            return self.names[first[0]]
        return bytes(token - self.eos_id - 1 for token in first if token > self.eos_id).decode(errors="replace")

    @property
    def fingerprint(self) -> str:
        """Equal for equal names."""
        return hashlib.sha256(json.dumps(["classes", self.names]).encode()).hexdigest()


def as_tokenizer(names: Sequence[str]) -> Tokenizer:
    """What an ``ImageTextDataset`` for a ``LabelStream`` takes as tokenizer."""
    return cast(Tokenizer, ClassNames(names))


class LabelStream(PairStream):
    """Rows of one picture and its class; row ``i`` depends on (seed, i), the form and the dataset alone.

    The first target of a row is its class, the others are IGNORED; all are where the picture cannot be decoded, or is
    skipped. Samples whose caption is no class are reported as problems, once.

    Args:
        dataset: of captions read by ``as_tokenizer``. seq_len: P = S, patches of a row; the last ones may be padding.
        shuffle, together, workers, skipped: as of pairs.

    Raises:
        ValueError: a row has too few patches, or no sample is of a class.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        form: PictureForm,
        *,
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        together: int = 0,
        workers: int = 0,
        skipped: Sequence[int] = (),
    ) -> None:
        if seq_len < form.fullest:
            raise ValueError(
                f"data.seq_len = {seq_len}: the largest picture has {form.fullest} patches, class token included; "
                "raise data.seq_len and data.patches to that"
            )
        options: Any = {"seed": seed, "shuffle": shuffle, "together": together, "workers": workers, "skipped": skipped}
        super().__init__(dataset, form, seq_len=seq_len, **options)
        known = dataset.tokens[self._samples] == 1
        for sample in self._samples[~known].tolist():
            caption = dataset.tokenizer.decode(np.concatenate(dataset.texts([sample])[0]))
            why = f"caption {caption!r} is none of the {dataset.tokenizer.eos_id} names in model.classes"
            dataset.on_problem(Problem(dataset.shard_of(sample), dataset.key(sample), why))
        if not known.any():
            raise ValueError(
                f"{dataset.paths[0].parent}: no sample's caption is one of model.classes; a caption must be exactly a "
                "name, such as `pretrain data pictures --template {name}` writes it"
            )
        self._samples, self._grids, self.labels = self._samples[known], self._grids[known], self.labels[known]
        self.num_samples = len(self._samples)

    def read(self, start: int, count: int) -> ImageSamples:
        """Rows ``start`` to ``start + count - 1`` of the stream."""
        batch = super().read(start, count)
        held = batch.documents[:, 0] >= 0
        batch.targets[:, 0] = np.where(held, batch.tokens[:, 0], IGNORED)
        short = ((0, 0), (0, self.seq_len - batch.images.shape[1]))
        return batch._replace(
            patches=np.pad(batch.patches, (*short, (0, 0))),
            images=np.pad(batch.images, short, constant_values=-1),
            grid=np.pad(batch.grid, (*short, (0, 0))),
        )

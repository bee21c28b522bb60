"""Image-text shards as one list of samples, addressed through their indexes; nothing is extracted to disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.cache import CacheOptions
from data_pipeline.images.captions import CaptionCounts, Captioning, load_counts
from data_pipeline.images.decode import MAX_BYTES, MAX_PIXELS, PictureError, check_limits, decode
from data_pipeline.images.form import PictureForm
from data_pipeline.images.index import MAX_TEXT, SUFFIX, PictureIndex, load_pictures
from data_pipeline.images.problems import Problem, Skip
from data_pipeline.index import find_key
from data_pipeline.places import Shard, at_once, find_shards, load_each
from data_pipeline.tokenizer import Tokenizer


class ImageTextDataset:
    """Usable samples of image-text shards, in the order of the shards and of the samples in them.

    Args:
        shards: a path, URL, command (``pipe:cat a.tar``) or pattern, or several: braces (``{00000..00127}.tar``) and
            globs (``train-*.tar``).
        tokenizer: of the captions.
        placeholder: text that stands for the next picture in an interleaved document.
        image_first: a caption without a placeholder has its one picture before it; else after it.
        max_pixels, max_bytes: of a picture, as its header says and as it is stored; larger ones are not decoded.
        on_problem: called with each sample that cannot be used: now with those that the indexes tell, later with those
            whose pictures turn out to be broken. ``Skip()`` counts and logs, ``fatal`` raises.
        progress: show a bar while shards without an index are read.
        cache: where shards that are elsewhere are kept.

    Attributes:
        num_samples: n. paths: the shards; those elsewhere: where they lie when they are needed. names: as given.
        tokens: int64 [n], of each text, without the end-of-text token. labels: int64 [n], -1 where there is none.
        first: int64 [n + 1]; sample i has the pictures first[i] to first[i + 1] - 1 of m.
        sizes: int64 [m, 2], height and width of each picture. before: int64 [m], tokens of the text before it.

    Raises:
        FileNotFoundError: a pattern matches nothing. ValueError: a shard is truncated, has a member with a forbidden
        name, disagrees with its index, or no sample can be used. OSError: a shard elsewhere cannot be fetched; reading
        samples raises these too.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer,
        *,
        placeholder: str = "<image>",
        image_first: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        on_problem: Callable[[Problem], None] | None = None,
        progress: bool = True,
        cache: CacheOptions | None = None,
    ) -> None:
        patterns = [shards] if isinstance(shards, str | Path) else list(shards)
        if not placeholder:
            raise ValueError("placeholder '': must be a text that stands for a picture, such as <image>")
        self._files = find_shards(shards, cache)
        self.paths, self.names = [shard.path for shard in self._files], [shard.name for shard in self._files]
        self.tokenizer, self.max_pixels, self.max_bytes = tokenizer, max_pixels, max_bytes
        self.on_problem = Skip() if on_problem is None else on_problem
        self._captioning = Captioning(tokenizer, placeholder, image_first)
        loaded = load_each(self._load, self._files, SUFFIX, progress=progress)
        self._indexes, counts = [index for index, _ in loaded], [count for _, count in loaded]
        kept = [self._usable(shard, count) for shard, count in enumerate(counts)]
        self._collect(counts, kept)
        if not self.num_samples:
            raise ValueError(f"shards {patterns}: none of {len(self.paths)} shards has a sample that can be used")

    def _load(self, shard: Shard, advance: Callable[[int], None]) -> tuple[PictureIndex, CaptionCounts]:
        index = load_pictures(shard, advance)
        return index, load_counts(shard, index, self._captioning)

    def _usable(self, shard: int, counts: CaptionCounts) -> np.ndarray:
        """Which samples of a shard can be used, as far as its index tells; the others are reported."""
        index, name = self._indexes[shard], self.names[shard]
        problems = [Problem(name, key, why) for key, why in index.problems]
        problems += [Problem(name, index.key(sample), why) for sample, why in counts.problems]
        usable = counts.tokens >= 0
        sizes = index.images[:, 1:]
        large = (sizes[:, 0] > self.max_bytes) | (sizes[:, 1] * sizes[:, 2] > self.max_pixels)
        owners = np.searchsorted(index.first, np.flatnonzero(large), side="right") - 1
        for sample, image in zip(owners.tolist(), np.flatnonzero(large).tolist(), strict=True):
            num_bytes, height, width = sizes[image].tolist()
            try:
                check_limits(num_bytes, width, height, self.max_pixels, self.max_bytes)
            except PictureError as error:
                problems.append(Problem(name, index.key(sample), str(error)))
            usable[sample] = False
        for problem in problems:
            self.on_problem(problem)
        return np.flatnonzero(usable)

    def _collect(self, counts: list[CaptionCounts], kept: list[np.ndarray]) -> None:
        self._shards = np.repeat(np.arange(len(kept)), [len(samples) for samples in kept])
        self._samples = np.concatenate(kept)
        pairs = list(zip(self._indexes, kept, strict=True))
        pictures = [_ranges(index.first[samples], index.first[samples + 1]) for index, samples in pairs]
        self.num_samples = len(self._samples)
        self.labels = np.concatenate([index.labels[samples] for index, samples in pairs])
        self.tokens = np.concatenate([c.tokens[samples] for c, samples in zip(counts, kept, strict=True)]).astype(int)
        numbers = np.concatenate([np.diff(index.first)[samples] for index, samples in pairs])
        self.first = np.concatenate([[0], np.cumsum(numbers)])
        images = np.concatenate([i.images[own] for i, own in zip(self._indexes, pictures, strict=True)])
        self.before = np.concatenate([c.before[own] for c, own in zip(counts, pictures, strict=True)]).astype(int)
        self._places, self.sizes = images[:, :2], images[:, 2:]

    @cached_property
    def fingerprint(self) -> str:
        """Equal where the same files give the same samples: shards in the same order, tokenizer, limits."""
        facts: list[object] = [[index.shard_size, index.ends] for index in self._indexes]
        facts += [self._captioning.fingerprint, self.max_pixels, self.max_bytes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def folder_file(self, name: str) -> Path:
        """The path of a file in the first shard's folder, fetched where that is elsewhere and has it."""
        return self._files[0].folder_file(name)

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """Numbers of the shards [n] that hold samples [n]."""
        return self._shards[samples]

    def shard_of(self, sample: int) -> str:
        """The shard that holds a sample, as its user knows it."""
        return self.names[self._shards[sample]]

    def key(self, sample: int) -> str:
        """The sample's WebDataset key."""
        return self._indexes[self._shards[sample]].key(int(self._samples[sample]))

    def find(self, key: str) -> np.ndarray:
        """Numbers of the samples with this key, int64, in whatever shard."""
        found = []
        for shard, index in enumerate(self._indexes):
            own = np.flatnonzero(self._shards == shard)
            found.append(own[find_key(index.keys[self._samples[own]], key)])
        return np.concatenate(found)

    def index(self, sample: int) -> PictureIndex:
        """The index of the shard that holds a sample."""
        return self._indexes[self._shards[sample]]

    def fetch(self, samples: Sequence[int]) -> None:
        """Have the shards of samples here, those that are elsewhere and missing fetched several at once."""
        files = {shard: self._files[shard] for shard in np.unique(self._shards[list(samples)]).tolist()}
        missing = {file.name: shard for shard, file in files.items() if file.url and not file.path.is_file()}
        if missing:
            places = [self._files[shard] for shard in missing.values()]
            at_once(lambda file: file.open(self._indexes[missing[file.name]]).close(), places)

    def texts(self, samples: Sequence[int]) -> list[list[np.ndarray]]:
        """Tokens before, between and after the pictures of each sample, one array more than it has pictures."""
        self.fetch(samples)
        pieces = []
        for sample in samples:
            index, number = self.index(sample), int(self._samples[sample])
            num_images = int(self.first[sample + 1] - self.first[sample])
            blob = self._read(sample, index.texts[number], MAX_TEXT + 1)
            try:
                pieces.append(self._captioning.split(blob, int(index.kinds[number]), num_images))
            except PictureError as error:
                problem = Problem(self.shard_of(sample), self.key(sample), str(error))
                raise ValueError(f"{problem}; it changed since it was counted: remove the .idx files there") from error
        return self._captioning.tokens(pieces)

    def picture(self, sample: int, number: int) -> bytes:
        """The file of a picture of a sample, as it is stored."""
        return self._read(sample, self._places[int(self.first[sample]) + number], self.max_bytes + 1)

    def pixels(self, sample: int, number: int, grid: tuple[int, int], form: PictureForm) -> np.ndarray:
        """A picture of a sample, decoded for a grid of patches: uint8 [rows * p, columns * p, 3].

        Raises:
            PictureError: it cannot be decoded.
        """
        height, width = grid[0] * form.patch, grid[1] * form.patch
        limits = {"max_pixels": self.max_pixels, "max_bytes": self.max_bytes}
        return decode(self.picture(sample, number), height, width, crop=form.resize == "crop", **limits)

    def report(self, sample: int, error: PictureError) -> None:
        """Hand a sample that turned out to be broken to ``on_problem``."""
        self.on_problem(Problem(self.shard_of(sample), self.key(sample), str(error)))

    def close(self) -> None:
        """Have the samples that were left out summed up in the log."""
        if isinstance(self.on_problem, Skip):
            self.on_problem.tell_total()

    def _read(self, sample: int, where: np.ndarray, most: int) -> bytes:
        with self._files[self._shards[sample]].open(self.index(sample)) as file:
            file.seek(int(where[0]))
            return file.read(min(int(where[1]), most))


def _ranges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers from each begin to before its end, end to end."""
    lengths = ends - begins
    return np.arange(lengths.sum()) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)

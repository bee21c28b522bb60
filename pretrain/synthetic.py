"""Packed samples made from a seed, for checks that need awkward documents and no files."""

import numpy as np

from data_pipeline.pack import IGNORED, ImageSamples, Samples


class SyntheticStream:
    """A `SampleStream`; sample ``i`` depends on (seed, i) alone. Its documents are those that break layouts.

    By i modulo 4: one document over the whole row; single tokens, and one document that crosses every cut; documents
    that end at cuts into 2, 4 and 8 parts; documents of random lengths, the last cut off by the end of the row.
    """

    def __init__(self, *, seq_len: int, vocab_size: int, seed: int = 0) -> None:
        self.seq_len, self.vocab_size, self.seed = seq_len, vocab_size, seed

    def read(self, start: int, count: int) -> Samples:
        """Samples ``start`` to ``start + count - 1``."""
        rows = [self._row(index) for index in range(start, start + count)]
        return Samples(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        length = self.seq_len
        draw = np.random.default_rng((self.seed, index))
        # Squared, so that some tokens come often and some never.
        tokens = (draw.random(length + 1) ** 2 * self.vocab_size).astype(np.int32)
        begins = self._begins(index, draw)
        first = np.zeros(length + 1, bool)
        first[begins[begins <= length]] = True
        documents = np.cumsum(first, dtype=np.int32) - 1
        starts = np.flatnonzero(first)
        positions = np.arange(length + 1, dtype=np.int32) - starts[documents].astype(np.int32)
        targets = np.where(first[1:], IGNORED, tokens[1:]).astype(np.int32)
        return tokens, targets, positions[:length], documents[:length]

    def _begins(self, index: int, draw: np.random.Generator) -> np.ndarray:
        """Where documents begin in the row, 0 among them."""
        length = self.seq_len
        kind = index % 4
        if kind == 0:
            return np.array([0])
        if kind == 1:
            return np.array([0, 1, 2, min(5, length), max(length - 3, 0), length - 1])
        if kind == 2:
            return np.array([0, length // 8, length // 4, length // 2, length])
        return np.concatenate([[0], np.cumsum(draw.geometric(6 / length, size=length))])


class SyntheticPictures:
    """A `SampleStream` with pictures in the documents of a `SyntheticStream`. By i modulo 3: one that fills the row's
    patches; none at all; small ones of all shapes.

    patches: of a row. values: numbers in a patch. sides: largest rows and columns of a picture, in patches, multiples
    of `merge`. class_slot: a place of its own stands before each picture's patches. queries: tokens of a picture; 0:
    one for merge x merge patches.
    """

    def __init__(
        self,
        text: SyntheticStream,
        *,
        patches: int,
        values: int,
        sides: tuple[int, int],
        merge: int,
        class_slot: bool,
        queries: int,
        image_token: int,
    ) -> None:
        self.text, self.seq_len, self.patches, self.values = text, text.seq_len, patches, values
        self.sides, self.merge, self.class_slot, self.queries = sides, merge, class_slot, queries
        self.image_token = image_token

    def read(self, start: int, count: int) -> ImageSamples:
        """Samples ``start`` to ``start + count - 1``."""
        rows = [self._row(index) for index in range(start, start + count)]
        return ImageSamples(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        tokens, targets, positions, documents = (array[0] for array in self.text.read(index, 1))
        draw = np.random.default_rng((self.text.seed, index, 1))
        slots, spans = (np.full(self.seq_len, -1, np.int32) for _ in range(2))
        images, grid = np.full(self.patches, -1, np.int32), np.zeros((self.patches, 2), np.int32)
        patches = draw.integers(0, 256, (self.patches, self.values), dtype=np.uint8)
        place, token = 0, 1
        for number, shape in enumerate(self._shapes(index, draw)):
            cells = self._cells(shape)
            own = self._slots(cells, place)
            if place + len(cells) > self.patches or token + len(own) >= self.seq_len:
                break
            if len(cells) < self.queries:
                continue
            images[place : place + len(cells)], grid[place : place + len(cells)] = number, cells
            slots[token : token + len(own)], spans[token : token + len(own)] = own, number
            documents[token : token + len(own)] = documents[token]
            place, token = place + len(cells), token + len(own) + 1 + int(draw.integers(3))
        documents[:] = np.cumsum(np.diff(documents, prepend=documents[0]) != 0)
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        positions[:] = np.arange(self.seq_len) - starts[documents]
        tokens[:-1][slots >= 0] = self.image_token
        last = np.append(np.diff(documents) != 0, False)
        targets[last | np.append(slots[1:] >= 0, False)] = IGNORED
        patches[images < 0] = 0
        return tokens, targets, positions, documents, slots, spans, patches, images, grid

    def _shapes(self, index: int, draw: np.random.Generator) -> list[tuple[int, int]]:
        rows, columns = (side // self.merge for side in self.sides)
        if index % 3 == 0:
            return [self.sides] * self.patches
        if index % 3 == 1:
            return []
        small = zip(draw.integers(1, rows + 1, self.patches), draw.integers(1, columns + 1, self.patches), strict=True)
        return [(int(r) * self.merge, int(c) * self.merge) for r, c in small]

    def _cells(self, shape: tuple[int, int]) -> np.ndarray:
        """Row and column of each place of a picture, merged ones side by side."""
        m = self.merge
        tall, wide = shape[0] // m, shape[1] // m
        cells = np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij"), -1)
        cells = cells.reshape(tall, m, wide, m, 2).swapaxes(1, 2).reshape(-1, 2).astype(np.int32)
        return np.concatenate([np.full((1, 2), -1, np.int32), cells]) if self.class_slot else cells

    def _slots(self, cells: np.ndarray, place: int) -> np.ndarray:
        """Places that a picture's tokens stand for."""
        if self.queries:
            return np.arange(place, place + self.queries)
        return np.arange(place + self.class_slot, place + len(cells), self.merge**2)


class SyntheticPairs(SyntheticPictures):
    """A `SampleStream` of a picture and a caption a row. By i modulo 4: both fill the row, then each is of any size;
    one in eight has no picture.
    """

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        tokens = self.text.read(index, 1)[0][0]
        draw = np.random.default_rng((self.text.seed, index, 1))
        places, patches_at = np.arange(self.seq_len, dtype=np.int32), np.arange(self.patches)
        length = self.seq_len if index % 4 == 0 else int(draw.integers(1, self.seq_len + 1))
        shape = self.sides if index % 4 == 0 else tuple(int(draw.integers(1, side + 1)) for side in self.sides)
        cells = self._cells((shape[0], shape[1]))[: self.patches]
        held = (patches_at < len(cells)) & (index % 8 != 7)
        grid = np.zeros((self.patches, 2), np.int32)
        grid[: len(cells)] = cells
        nothing = np.full(self.seq_len, -1, np.int32)
        patches = draw.integers(0, 256, (self.patches, self.values), dtype=np.uint8) * held[:, None]
        if self.class_slot:
            patches[0] = 0
        documents, images = (np.where(inside, 0, -1).astype(np.int32) for inside in (places < length, held))
        return tokens, np.full_like(nothing, IGNORED), places, documents, nothing, nothing, patches, images, grid


class SyntheticLabels(SyntheticPairs):
    """A `SampleStream` of a picture and its class a row, the first target; the classes are the text's vocabulary."""

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        tokens, targets, *others = super()._row(index)
        if others[-2][0] >= 0:
            targets[0] = tokens[0]
        return tokens, targets, *others

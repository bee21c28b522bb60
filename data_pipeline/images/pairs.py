"""Pairs for dual encoders: a row is one picture and its caption, a pure function of (seed, global row index)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.decode import PictureError
from data_pipeline.images.form import PictureForm
from data_pipeline.images.problems import Problem
from data_pipeline.images.stream import empty_samples
from data_pipeline.pack import Entries, ImageSamples, shuffled


class PairStream:
    """Rows of one picture and one caption; row ``i`` depends on (seed, i), the form and the dataset alone.

    ``tokens`` hold the caption and the end-of-text token, which a caption that is too long keeps as its last one.
    Nothing is predicted (all ``targets`` are ignored) and no token stands for the picture. A row whose picture cannot
    be decoded is all padding. P is what the largest picture needs.

    Args:
        seq_len: S, tokens of a row. shuffle: permute the samples anew each epoch.
        together: shards whose samples are shuffled among themselves, in a shuffled order of shards; 0: all.
        workers: threads that decode; 0 decodes in the caller's. The rows are the same.
        skipped: numbers of samples whose rows are all padding.

    Attributes:
        num_samples: n, rows of one epoch: the dataset's samples with exactly one picture; others are reported as
            problems. labels: int64 [n] in the dataset's order, -1 where there is none.

    Raises:
        ValueError: no sample is a pair.
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
        if seq_len < 2:
            raise ValueError(f"seq_len {seq_len}: must be at least 2, for a caption and the end-of-text token")
        self.dataset, self.form, self.seq_len, self.seed, self.shuffle = dataset, form, seq_len, seed, shuffle
        self._skipped, self._together = frozenset(skipped), together
        numbers = np.diff(dataset.first)
        for sample in np.flatnonzero(numbers != 1).tolist():
            why = f"{numbers[sample]} pictures, a pair has one"
            dataset.on_problem(Problem(str(dataset.shard_of(sample)), dataset.key(sample), why))
        self._samples = np.flatnonzero(numbers == 1)
        self.num_samples = len(self._samples)
        if not self.num_samples:
            raise ValueError(f"{dataset.paths[0].parent}: no sample has exactly one picture, as pairs need")
        self.labels = dataset.labels[self._samples]
        self._grids = form.grids(dataset.sizes[dataset.first[self._samples]])
        self._orders: dict[int, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None

    @property
    def patch_shape(self) -> tuple[int, int]:
        """P, patches of a row, and D, values of a patch."""
        return self.form.fullest, self.form.values

    def places(self, start: int, count: int) -> np.ndarray:
        """Which pairs, of ``labels`` say, rows ``start`` to ``start + count - 1`` are."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        found = (divmod(index, self.num_samples) for index in range(start, start + count))
        return np.array([self._order(epoch)[place] for epoch, place in found])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.arange(self.num_samples)
            if self.shuffle:
                shards = self.dataset.shards_of(self._samples)
                order = np.concatenate(shuffled(shards, len(self.dataset.paths), self._together, self.seed, epoch))
            self._orders = {epoch: order, **{past: kept for past, kept in self._orders.items() if past == epoch - 1}}
        return self._orders[epoch]

    def documents(self, start: int, count: int) -> Entries:
        """Which sample of the dataset each of rows ``start`` to ``start + count - 1`` is."""
        return Entries(np.arange(count), self._samples[self.places(start, count)], np.zeros(count, np.int64))

    def read(self, start: int, count: int) -> ImageSamples:
        """Rows ``start`` to ``start + count - 1`` of the stream."""
        places = self.places(start, count).tolist()
        samples = self._samples[places].tolist()
        self.dataset.fetch(samples)
        decoded = list(map(self._decode, places) if self._pool is None else self._pool.map(self._decode, places))
        eos_id = self.dataset.tokenizer.eos_id
        batch = empty_samples(count, self.seq_len, self.form.fullest, self.form.values, eos_id)
        texts = self.dataset.texts(samples)
        for row, (place, patches, pieces) in enumerate(zip(places, decoded, texts, strict=True)):
            if isinstance(patches, PictureError):
                self.dataset.report(samples[row], patches)
                continue
            if samples[row] in self._skipped:
                continue
            caption = np.concatenate(pieces)[: self.seq_len - 1]
            length = len(caption) + 1  # eos_id fills the rest of the row
            batch.tokens[row, : len(caption)] = caption
            batch.positions[row, :length] = np.arange(length)
            batch.documents[row, :length] = 0
            batch.patches[row, : len(patches)] = patches
            batch.images[row, : len(patches)] = 0
            batch.grid[row, : len(patches)] = self.form.cells(self._grid(place))
        return batch

    def _decode(self, place: int) -> np.ndarray | PictureError:
        try:
            pixels = self.dataset.pixels(int(self._samples[place]), 0, self._grid(place), self.form)
        except PictureError as error:
            return error
        return self.form.patches(pixels)

    def _grid(self, place: int) -> tuple[int, int]:
        rows, columns = self._grids[place].tolist()
        return rows, columns

    def close(self) -> None:
        """End the threads that decode, and log how many samples were left out; reading on works, without threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.dataset.close()

"""Image-text samples as an endless stream of rows with two budgets, a pure function of (seed, global row index).

    rows:    samples packed together once, by (seed, index of the shards)       n rows
    row i:   row permuted(i % n) of epoch i // n, decoded and laid out when it is read

Packing is the same in each epoch, so that every epoch has n rows and row i is found without the epochs before it; the
rows come in another order each time.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.decode import PictureError
from data_pipeline.images.form import PictureForm
from data_pipeline.images.pack import WINDOW, PackingCost, Rows, pack_rows, packing_cost
from data_pipeline.pack import IGNORED, Entries, ImageSamples, permutation, permuted, shuffled


class ImageTextStream:
    """Packed rows of a dataset; row ``i`` depends on (seed, i), the form and the dataset alone.

    A document is its text and pictures in order and the end-of-text token. One that is longer than a row's budgets ends
    where they do, before a picture that would not be whole. A document with a picture that cannot be decoded is left
    out of its row, which keeps its index; the others move up, under the numbers that they have anyway.

    Args:
        form: what becomes of a picture. seq_len: S, tokens of a row. patches: P, patches of a row.
        shuffle: permute samples, and rows anew each epoch; else they come in the dataset's order.
        together: shards whose samples are packed and shuffled among themselves, in an order of shards that is shuffled
            too; 0: all.
        workers: threads that decode; 0 decodes in the caller's. The rows are the same.
        window: samples that packing chooses from.
        skipped: numbers of samples that are left out of their rows, as if they could not be decoded.

    Attributes:
        num_samples: n, rows of one epoch. num_cut: documents that end early.

    Raises:
        ValueError: a picture of the largest size does not fit a row.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        form: PictureForm,
        *,
        seq_len: int,
        patches: int,
        seed: int = 0,
        shuffle: bool = True,
        together: int = 0,
        workers: int = 0,
        window: int = WINDOW,
        skipped: Sequence[int] = (),
    ) -> None:
        self.dataset, self.form, self.seq_len, self.patches = dataset, form, seq_len, patches
        self.seed, self.shuffle, self._skipped = seed, shuffle, frozenset(skipped)
        _check_budgets(form, seq_len, patches)
        self._grids = form.grids(dataset.sizes)
        self._measure()
        parts = [np.arange(dataset.num_samples)]
        if shuffle:
            shards, num_shards = dataset.shards_of(parts[0]), len(dataset.paths)
            parts = shuffled(shards, num_shards, together, seed, 0)
        budgets: dict[str, int] = {"seq_len": seq_len, "budget": patches, "window": max(1, window)}
        packed = [pack_rows(self._lengths, self._patch_counts, part, **budgets) for part in parts]
        lengths = [np.diff(rows.first) for rows in packed]
        first = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        self._rows = Rows(np.concatenate([rows.members for rows in packed]), first)
        self.num_samples = len(self._rows.first) - 1
        self._bounds = np.cumsum([0, *map(len, lengths)])  # rows of each window of shards
        self._windows: tuple[int, np.ndarray, np.ndarray] = -1, self._bounds, self._bounds
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None

    @property
    def patch_shape(self) -> tuple[int, int]:
        """P, patches of a row, and D, values of a patch."""
        return self.patches, self.form.values

    def _measure(self) -> None:
        """What each document takes of the budgets, and how many of its pictures are kept."""
        dataset, first = self.dataset, self.dataset.first
        tokens, patches = self.form.num_tokens(self._grids), self.form.num_patches(self._grids)
        owners = np.repeat(np.arange(dataset.num_samples), np.diff(first))
        ends_tokens, ends_patches = (_within(np.cumsum(amounts), amounts, first) for amounts in (tokens, patches))
        ends_tokens = ends_tokens + dataset.before
        kept = (ends_tokens < self.seq_len) & (ends_patches <= self.patches)
        num_kept = np.bincount(owners[kept], minlength=dataset.num_samples)
        whole = num_kept == np.diff(first)
        whole_lengths = dataset.tokens + np.bincount(owners, tokens, dataset.num_samples).astype(int) + 1
        lengths = np.minimum(whole_lengths, self.seq_len)
        # A document ends before the first picture that is left out.
        dropped = first[:-1][~whole] + num_kept[~whole]
        lengths[~whole] = np.minimum(ends_tokens[dropped] - tokens[dropped], self.seq_len)
        self.num_cut = int((lengths < whole_lengths).sum())
        self._lengths, self._kept = lengths, num_kept
        self._patch_counts = np.bincount(owners[kept], patches[kept], dataset.num_samples).astype(int)

    def rows(self, start: int, count: int) -> list[np.ndarray]:
        """The samples of the dataset that rows ``start`` to ``start + count - 1`` hold, in their order."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        found = []
        for index in range(start, start + count):
            epoch, place = divmod(index, self.num_samples)
            if self.shuffle:
                place = self._place(epoch, place)
            found.append(self._rows.members[self._rows.first[place] : self._rows.first[place + 1]])
        return found

    def _place(self, epoch: int, place: int) -> int:
        """The row that comes at a place of an epoch: windows of shards in another order, each permuted inside."""
        num_windows = len(self._bounds) - 1
        known = self._windows  # another thread may replace it meanwhile
        if known[0] != epoch:
            order = permutation(num_windows, self.seed, epoch)
            known = self._windows = epoch, order, np.cumsum(np.diff(self._bounds)[order])
        _, order, ends = known
        number = int(np.searchsorted(ends, place, side="right"))
        begin, end = self._bounds[order[number] :][:2].tolist()
        inside = np.array([place - int(ends[number]) + end - begin])
        # Where a window is the whole epoch, this is (seed, epoch).
        return begin + int(permuted(inside, end - begin, self.seed, epoch * num_windows + number)[0])

    def documents(self, start: int, count: int) -> Entries:
        """Which samples of the dataset lie in rows ``start`` to ``start + count - 1``, also those that are left out."""
        rows = self.rows(start, count)
        documents = np.concatenate(rows)
        return Entries(np.repeat(np.arange(count), [len(row) for row in rows]), documents, np.zeros_like(documents))

    def cost(self, start: int, steps: int, global_batch: int, ranks: int) -> PackingCost:
        """How evenly ``steps`` steps from row ``start`` on are spread over ``ranks``; nothing is decoded."""
        rows = self.rows(start, steps * global_batch)
        sums = [np.array([amounts[row].sum() for row in rows]) for amounts in (self._lengths, self._patch_counts)]
        tokens, patches = (amounts.reshape(steps, global_batch) for amounts in sums)
        return packing_cost(tokens, patches, seq_len=self.seq_len, budget=self.patches, ranks=ranks)

    def read(self, start: int, count: int) -> ImageSamples:
        """Rows ``start`` to ``start + count - 1`` of the stream."""
        rows = [row.tolist() for row in self.rows(start, count)]
        samples = list(dict.fromkeys(sample for row in rows for sample in row))  # two epochs may meet
        self.dataset.fetch(samples)
        texts = dict(zip(samples, self.dataset.texts(samples), strict=True))
        pictures = self._pictures(samples)
        batch = empty_samples(count, self.seq_len, self.patches, self.form.values, self.dataset.tokenizer.eos_id)
        for number, row in enumerate(rows):
            self._lay_out(ImageSamples(*(array[number] for array in batch)), row, texts, pictures)
        return batch

    def _pictures(self, samples: Sequence[int]) -> dict[int, list[np.ndarray] | None]:
        """Patches of the pictures of each sample; None for one that is skipped, or broken, which is reported."""
        wanted = [sample for sample in samples if sample not in self._skipped]
        jobs = [(sample, number) for sample in wanted for number in range(int(self._kept[sample]))]
        decoded = list(map(self._decode, jobs) if self._pool is None else self._pool.map(self._decode, jobs))
        found: dict[int, list[np.ndarray] | None] = {
            sample: None if sample in self._skipped else [] for sample in samples
        }
        for (sample, _), patches in zip(jobs, decoded, strict=True):
            own = found[sample]
            if isinstance(patches, PictureError):
                found[sample] = None
                self.dataset.report(sample, patches)
            elif own is not None:
                own.append(patches)
        return found

    def _decode(self, job: tuple[int, int]) -> np.ndarray | PictureError:
        sample, number = job
        grid = self._grid(sample, number)
        try:
            return self.form.patches(self.dataset.pixels(sample, number, grid, self.form))
        except PictureError as error:
            return error

    def _grid(self, sample: int, number: int) -> tuple[int, int]:
        rows, columns = self._grids[int(self.dataset.first[sample]) + number].tolist()
        return rows, columns

    def _lay_out(
        self,
        row: ImageSamples,
        samples: list[int],
        texts: dict[int, list[np.ndarray]],
        pictures: dict[int, list[np.ndarray] | None],
    ) -> None:
        """Write the documents of a row one after the other; ``row`` has the arrays of one row, all padding."""
        at = place = image = 0
        for document, sample in enumerate(samples):
            own = pictures[sample]
            if own is None:
                continue
            parts: list[tuple[np.ndarray, np.ndarray, int]] = []
            for number, text in enumerate(texts[sample]):
                parts.append((text.astype(np.int32), np.full(len(text), -1, np.int32), -1))
                if number < len(own):
                    grid, patches = self._grid(sample, number), own[number]
                    parts.append((*self.form.tokens(grid, place), image))
                    row.patches[place : place + len(patches)] = patches
                    row.images[place : place + len(patches)] = image
                    row.grid[place : place + len(patches)] = self.form.cells(grid)
                    place, image = place + len(patches), image + 1
            length = int(self._lengths[sample])
            _write_document(row, slice(at, at + length), parts, document, self.dataset.tokenizer.eos_id)
            at += length

    def close(self) -> None:
        """End the threads that decode, and log how many samples were left out; reading on works, without threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.dataset.close()


def _write_document(
    row: ImageSamples, where: slice, parts: list[tuple[np.ndarray, np.ndarray, int]], document: int, eos_id: int
) -> None:
    """Write (ids, slots, span) of each part and the end-of-text token, as much as has room, with their targets."""
    length = where.stop - where.start
    ids, slots = (np.concatenate([part[kind] for part in parts]) for kind in (0, 1))
    spans = np.concatenate([np.full(len(part[0]), part[2], np.int32) for part in parts])
    ids, slots, spans = (
        np.append(array, last)[:length].astype(np.int32) for array, last in ((ids, eos_id), (slots, -1), (spans, -1))
    )
    assert len(ids) == length, "the index counted other tokens than the text has"
    row.tokens[where], row.slots[where], row.spans[where] = ids, slots, spans
    row.positions[where] = np.arange(length)
    row.documents[where] = document
    row.targets[where.start : where.stop - 1] = np.where(spans[1:] >= 0, IGNORED, ids[1:])


def empty_samples(count: int, seq_len: int, patches: int, values: int, eos_id: int) -> ImageSamples:
    """Rows of nothing but padding: B = ``count``, S, P, D."""
    flags = (np.full((count, seq_len), -1, np.int32) for _ in range(3))
    documents, slots, spans = flags
    return ImageSamples(
        tokens=np.full((count, seq_len + 1), eos_id, np.int32),
        targets=np.full((count, seq_len), IGNORED, np.int32),
        positions=np.zeros((count, seq_len), np.int32),
        documents=documents,
        slots=slots,
        spans=spans,
        patches=np.zeros((count, patches, values), np.uint8),
        images=np.full((count, patches), -1, np.int32),
        grid=np.zeros((count, patches, 2), np.int32),
    )


def _within(ends: np.ndarray, amounts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Where each picture ends in its own document: ``ends`` [m] count from the first document on."""
    begins = np.append(ends - amounts, 0)[np.minimum(first[:-1], len(ends))]
    return ends - np.repeat(begins, np.diff(first))


def _check_budgets(form: PictureForm, seq_len: int, patches: int) -> None:
    most = form.most_tokens
    if form.fullest > patches or patches % form.merge**2 or most >= seq_len:
        cure = "lower max_patches" if form.resize == "native" else "lower size, raise the budgets"
        raise ValueError(
            f"pictures of up to {form.fullest} patches and {most} tokens do not fit rows of {patches} patches (a "
            f"multiple of {form.merge**2}) and {seq_len} tokens with text after them; {cure} or resize native"
        )

"""Steps of a training run out of a sample stream: sliced over data ranks, cut into micro-batches, read ahead.

    step at cursor c:   samples c ............................ c + global_batch - 1
    data rank r of R:   the r-th contiguous part of it, cut into micro-batches in order

The cursor is the global sample index and travels with each step, so a resume is exact however far was read
ahead.
"""

from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch

from data_pipeline.pack import IGNORED, ImageSamples, Samples, SampleStream, TokenStream

MicroBatch = dict[str, torch.Tensor]
"""``tokens``, ``targets`` (-100 ignored), ``positions``, ``documents``; each int32 [B, S]. With pictures also the other
fields of ``ImageSamples``.
"""


@runtime_checkable
class Closing(Protocol):
    """A stream that has something to do when no more is read from it."""

    def close(self) -> None: ...


class Loader:
    """Endless iterator over steps: ``(micro-batches of this rank, cursor after the step)``.

    Args:
        global_batch: samples a step over all ranks. micro_batch: samples a micro-batch.
        rank, world: of the data-parallel group (ranks that read the same samples share a rank).
        cursor: global index of the first sample, as handed out with the last step done.
        prefetch: steps read ahead in one background thread; 0 reads in the caller's.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"data rank {rank} of {world}: must be 0 to {world - 1}")
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world):
            raise ValueError(
                f"global_batch {global_batch}: must be a multiple of micro_batch {micro_batch} x {world} "
                f"data ranks = "
                f"{micro_batch * world}; change one of the three"
            )
        if cursor < 0 or prefetch < 0:
            raise ValueError(f"cursor {cursor}, prefetch {prefetch}: must be 0 or more")
        self.stream, self.global_batch, self.micro_batch = stream, global_batch, micro_batch
        self.cursor, self.prefetch = cursor, prefetch
        self._per_rank = global_batch // world
        self._shift = rank * self._per_rank
        self._ready: Queue[tuple[list[MicroBatch], int] | Exception] = Queue(max(prefetch, 1))
        self._thread: Thread | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[list[MicroBatch], int]:
        """The next step. An error of the background thread is raised here, at the step it belongs to."""
        if self._closed:
            raise StopIteration
        if not self.prefetch:
            item = self._read(self.cursor), self.cursor + self.global_batch
        else:
            if self._thread is None:
                self._thread = Thread(target=self._read_ahead, args=(self.cursor,), name="loader", daemon=True)
                self._thread.start()
            ready = self._ready.get()
            if isinstance(ready, Exception):
                self._thread = None  # it has ended; asking again tries the same step again
                raise ready
            item = ready
        self.cursor = item[1]
        return item

    def _read_ahead(self, cursor: int) -> None:
        try:
            while not self._closed:
                batches = self._read(cursor)
                cursor += self.global_batch
                self._ready.put((batches, cursor))
        except Exception as error:
            self._ready.put(error)

    def _read(self, cursor: int) -> list[MicroBatch]:
        samples = self.stream.read(cursor + self._shift, self._per_rank)
        whole = to_torch(samples)
        size = self.micro_batch
        cuts = range(0, self._per_rank, size)
        return [{name: value[cut : cut + size] for name, value in whole.items()} for cut in cuts]

    def close(self) -> None:
        """Stop reading ahead, and close the stream where it can be. Further iteration ends."""
        self._closed = True
        while self._thread is not None and self._thread.is_alive():
            with suppress(Empty):
                self._ready.get_nowait()  # makes room, if the thread waits for it
            self._thread.join(0.01)
        if isinstance(self.stream, Closing):
            self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FiniteStream(SampleStream, Protocol):
    """A stream that knows how many samples an epoch has."""

    @property
    def num_samples(self) -> int: ...


def held_out_batches(
    stream: FiniteStream, *, micro_batch: int, rank: int = 0, world: int = 1, max_samples: int | None = None
) -> Iterator[MicroBatch]:
    """One pass over the stream's first epoch, every target exactly once over all ranks.

    Each rank gets the same number of full micro-batches (so collectives match); what is past the end has only
    ignored targets. ``max_samples`` stops early, counted over all ranks. Use a stream with ``shuffle=False``.
    """
    num_samples = stream.num_samples if max_samples is None else min(max_samples, stream.num_samples)
    for start in range(0, num_samples, micro_batch * world):
        first = start + rank * micro_batch
        samples = stream.read(first, micro_batch)
        rows = first + np.arange(micro_batch)[:, None]
        past = np.broadcast_to(rows >= num_samples, samples.targets.shape)
        if isinstance(stream, TokenStream):  # each token but the first is a target once; the last sample runs on
            past = past | (rows * stream.seq_len + np.arange(stream.seq_len) >= stream.dataset.num_tokens - 1)
        samples.targets[past] = IGNORED
        yield to_torch(samples)


def to_torch(samples: Samples | ImageSamples) -> MicroBatch:
    """Samples as a micro-batch of tensors that share their memory: tokens lose their last column, only a
    target.
    """
    arrays = samples._asdict() | {"tokens": samples.tokens[:, :-1]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

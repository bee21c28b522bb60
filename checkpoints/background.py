"""Saving while training goes on: a copy in host memory, and a thread that writes it."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.collective import Ranks, explain
from checkpoints.commit import Snapshot
from checkpoints.pieces import Contents, Piece, Plan, local_part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """How a save in the background ended."""

    step: int
    seconds: float
    path: Path | None  # None where it failed
    error: str  # one line; empty where it succeeded

    def __str__(self) -> str:
        if self.path is not None:
            return f"saved {self.path} in the background, {self.seconds:.1f} s"
        return f"a save in the background failed, the next one tries again: {self.error}"


class Staging:
    """Host memory for what this rank writes: one buffer a part, laid out as the file is. Made once, then reused.

    lock: page-lock it, for copies from a GPU. Raises ValueError where there is not enough memory.
    """

    def __init__(self, plan: Plan, *, lock: bool) -> None:
        self.plan = plan
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._locked = lock
        sizes = {part: sum(piece.num_bytes for piece in pieces) for part, pieces in plan.pieces.items()}
        for part, pieces in plan.pieces.items():
            try:
                # Filled at once: the first touch of a page costs several times what later ones do.
                buffer = torch.full((sizes[part],), 0, dtype=torch.uint8)
            except RuntimeError as error:
                raise ValueError(
                    f"checkpoint.async needs {sum(sizes.values()) / 1e9:.1f} GB of host memory in this process: set "
                    "checkpoint.async = false"
                ) from error
            if self._locked and len(buffer):
                _page_lock(buffer)
            self._buffers[part] = buffer
            self._views[part] = _views(buffer, pieces)

    def copy(self, contents: Contents) -> None:
        """Take the values as they are now; returns when they may change again."""
        on_gpu = False
        for part, pieces in self.plan.pieces.items():
            for piece, view in zip(pieces, self._views[part], strict=True):
                local = local_part(contents[part][piece.name])
                on_gpu |= local.is_cuda
                view.copy_(local, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    def contents(self, part: str) -> Iterable[Tensor]:
        return (self._buffers[part],)

    def close(self) -> None:
        for buffer in self._buffers.values():
            if self._locked and len(buffer):
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self._buffers.clear()
        self._views.clear()


class Background:
    """One save at a time in a thread, over a process group of its own: what its ranks tell each other can never be
    taken for something that the training says at the same time. Creating it is collective.

    write: called in the thread with what `start` was given and the ranks of the thread.
    """

    def __init__(self, write: Callable[[Snapshot, Ranks], Path]) -> None:
        self.ranks = Ranks(own_group=True)
        self.staging: Staging | None = None
        self.last: Snapshot | None = None
        self.failed = False  # of the last save
        self._write = write
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._reports: deque[Report] = deque()

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def allocate(self, plan: Plan, *, lock: bool) -> None:
        if self.staging is not None:
            self.staging.close()
        self.staging = Staging(plan, lock=lock)

    def start(self, snapshot: Snapshot) -> None:
        assert not self.busy
        self.last, self.failed = snapshot, False
        self._running = self._pool.submit(self._run, snapshot)

    def wait(self) -> None:
        """For the end of the save that is running, however it ends."""
        if self._running is not None:
            self._running.result()

    def reports(self) -> list[Report]:
        """Of the saves that have ended since the last call."""
        found = []
        while self._reports:
            found.append(self._reports.popleft())
        return found

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
        if self.staging is not None:
            self.staging.close()
            self.staging = None

    def _run(self, snapshot: Snapshot) -> None:
        start = time.perf_counter()
        path, text = None, ""
        try:
            path = self._write(snapshot, self.ranks)
        except Exception as error:  # of whatever kind: it is reported, and raised by `CheckpointStore.finish`
            self.failed = True
            text = explain(error)[1]
            log.debug("save in the background", exc_info=True)
        self._reports.append(Report(snapshot.step, time.perf_counter() - start, path, text))


def _page_lock(buffer: Tensor) -> None:
    """`pin_memory()` would round the size up to a power of two."""
    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 1))  # 1: for all devices
    if error:
        raise ValueError(
            f"checkpoint.async could not page-lock {len(buffer) / 1e9:.1f} GB of host memory (CUDA error {error}): set "
            "checkpoint.async = false"
        )


def _views(buffer: Tensor, pieces: list[Piece]) -> list[Tensor]:
    views, start = [], 0
    for piece in pieces:
        end = start + piece.num_bytes
        views.append(buffer[start:end].view(piece.torch_dtype).view(piece.sizes))
        start = end
    return views

"""Where each rank is: its step and phase, in a file that the other ranks and `pretrain status` read."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from pretrain.history import now, this_start

Item = TypeVar("Item")
FOLDER = "heartbeats"
WRITE_SECONDS = 1.0  # between two writings of the file
SAMPLE_SECONDS = 0.05  # between two looks at what the main thread does
LOOKS = 40  # of which a pace is made at least
ENDED = "ended"
# How many times `watchdog.stall_s` a rank may stay silent in each phase.
PATIENCE = {
    "starting": 3, "loading": 3, "first step": 3, "step": 1, "waiting for data": 1, "evaluating": 3, "saving": 3,
}  # fmt: skip
STEPPING = ("first step", "step", "waiting for data")
# Files of torch in which a thread stands that waits for other ranks, however it came there.
WAITING = ("distributed_c10d.py", "_functional_collectives.py", "_fsdp_collectives.py")
WAITING_DEPTH = 4  # frames above them that a wait may have


class WatchdogConfig(BaseModel):
    """`[watchdog]`"""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stall_s: float = Field(
        600.0,
        ge=0,
        description="Seconds without progress after which all ranks dump their stacks and end, to be started anew; "
        "three times as long while loading, saving, evaluating and in the first step; 0: never",
    )


@dataclass
class Pace:
    """What a rank's main thread did in the steps between two lines of the log, in seconds a step.

    step: wall clock. own: without waiting for other ranks; None where that cannot be told. data: of step, waiting for
    data.
    """

    step: float = 0.0
    own: float | None = None
    data: float = 0.0


@dataclass
class _Window:
    """What was seen of the main thread since some step."""

    step: int
    seconds: float = 0.0
    looks: int = 0
    elsewhere: int = 0
    data: int = 0


class Heartbeat:
    """Of one rank: the loop says where it is, a thread of its own writes that down. Nothing here raises or waits.

    The file `heartbeats/rank-00000.json` holds "step" and "phase" (a key of PATIENCE, or ENDED); "time" (UTC) of the
    last time that the rank moved on, and "beats", how often it did; "alive", when the thread wrote this; "host", "pid",
    "job", "restart"; "step_s", "own_s" and "data_s", the rank's pace over `every` steps or two seconds.

    "own_s" is null on GPUs: there calls of collectives return at once, and a host waits for its device alike whether
    that computes or waits for other ranks, in collectives that overlap with computing.

    Args:
        run_dir: of the run. rank: of this process. every: steps over which the pace is taken.
    """

    def __init__(self, run_dir: Path, rank: int, every: int = 10) -> None:
        self.path = run_dir / FOLDER / f"rank-{rank:05d}.json"
        self.rank, self.every = rank, every
        self.step, self.phase_name, self.beats = 0, "starting", 0
        self.pace, self.window = Pace(), 0  # window: how many of them are over
        self.moved, self._moved_at, self._written = time.monotonic(), now(), -1
        self._identity = {**this_start(), "pid": os.getpid()}
        self._own_known = not torch.cuda.is_available()  # then ranks compute there, see `parallel.world`
        self.main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.enter(ENDED)
        self._write()

    def enter(self, phase: str) -> None:
        """From now on the rank is in this phase."""
        self.phase_name = phase
        self.beats += 1
        self.moved = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The rank is in this phase within the context."""
        before = self.phase_name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def done(self, step: int) -> None:
        """`step` steps are taken."""
        self.step = step
        self.enter("step")

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each that is asked for is a sign of life."""
        for item in items:
            self.enter(self.phase_name)
            yield item

    @property
    def silence(self) -> float:
        """Seconds since the rank last moved on."""
        return time.monotonic() - self.moved

    def _run(self) -> None:
        written = looked = time.monotonic()
        window = _Window(self.step)
        while not self._stopped.wait(SAMPLE_SECONDS):
            before, looked = looked, time.monotonic()
            window = self._look(window, looked - before)
            if looked - written >= WRITE_SECONDS:
                written = looked
                self._write()

    def _look(self, window: _Window, seconds: float) -> _Window:
        """Add what the main thread does now. A new window where this one is over."""
        phase, step = self.phase_name, self.step
        if phase not in STEPPING:
            return window
        if phase == "first step":  # is no measure of anything
            return window
        if not window.looks:
            window = _Window(step)
        window.looks, window.seconds = window.looks + 1, window.seconds + seconds
        if phase == "waiting for data":
            window.data += 1
        elif waits_for_ranks(sys._current_frames().get(self.main)):
            window.elsewhere += 1
        if step // self.every == window.step // self.every or window.looks < LOOKS:
            return window
        steps = step - window.step
        a_look = window.seconds / window.looks / steps
        own = (window.looks - window.elsewhere) * a_look if self._own_known else None
        data = window.data * a_look
        self.pace, self.window = Pace(window.seconds / steps, own, data), self.window + 1
        return _Window(step)

    def _write(self) -> None:
        if (moved := self.beats) != self._written:
            self._moved_at, self._written = now(), moved
        own = self.pace.own
        record: dict[str, Any] = {
            "time": self._moved_at, "step": self.step, "phase": self.phase_name, **self._identity, "beats": moved,
            "alive": now(), "step_s": round(self.pace.step, 4), "own_s": None if own is None else round(own, 4),
            "data_s": round(self.pace.data, 4), "window": self.window,
        }  # fmt: skip
        with suppress(OSError):  # the folder may be full, or gone: training goes on
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Closed each time: other hosts of a shared file system see what was written only then.
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                text = json.dumps(record).encode()
                os.pwrite(file, text + b" " * (1023 - len(text)) + b"\n", 0)  # of one length: nothing to cut off
            finally:
                os.close(file)


def waits_for_ranks(frame: FrameType | None) -> bool:
    """Whether a thread waits for other ranks, by its innermost frames."""
    for _ in range(WAITING_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(WAITING):
            return True
        frame = frame.f_back
    return False

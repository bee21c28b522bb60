"""Ends a run that stands still: every rank dumps its stacks, one of them says why, all exit to be started anew.

silence of the own heartbeat > stall_s     first rank to see it makes stacks/stalled.json, the claim
claim there                                every rank writes stacks/<time>-rank-00000.txt and .json, then waits
all reports there, or no more to come      the rank of the claim explains, records the end "stalled"; all exit
"""

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.flight import collectives, threads
from launch.rundir import append_end, heartbeat_file, read_json, write_json
from launch.stall import explain_stall
from launch.stragglers import Stragglers
from parallel.world import World
from pretrain.heartbeat import PATIENCE, Heartbeat

STALLED = os.EX_TEMPFAIL  # exit code 75: start anew
FOLDER = "stacks"
CLAIM = "stalled.json"


def watching(run_dir: Path, world: World, stall_s: float) -> Callable[[Heartbeat], AbstractContextManager[Any]]:
    """What `train` is to be watched with; nothing when `stall_s` is 0."""

    @contextmanager
    def watch(beat: Heartbeat) -> Iterator[None]:
        watchdog = Watchdog(run_dir, world, beat, stall_s)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()

    return watch if stall_s else lambda _beat: nullcontext()


class Watchdog(threading.Thread):
    """The thread of one rank. Ranks move together, so that of each one's own silence all others' follows; their files
    are read only when there is some.

    A thread of Python's starves where another one keeps the interpreter's lock in a library: then a timer of
    `faulthandler` dumps the stacks to standard error, and the other ranks name this one.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        beat: Heartbeat,
        stall_s: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.run_dir, self.world, self.beat, self.stall_s, self.leave = run_dir, world, beat, stall_s, leave
        self.folder = run_dir / FOLDER
        self.poll = min(1.0, stall_s / 10)
        self._over = threading.Event()
        self._stragglers = Stragglers(run_dir, world.size) if world.rank == 0 and world.size > 1 else None
        if world.rank == 0:  # an earlier start's; no rank of this one can have stalled yet
            (self.folder / CLAIM).unlink(missing_ok=True)

    def stop(self) -> None:
        """The run is over."""
        self._over.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self.poll):
            faulthandler.dump_traceback_later(self.stall_s + self.poll, file=2)
            before, looked = looked, time.monotonic()
            if looked - before > self.stall_s / 2:  # the whole process was stopped, as a suspended job is
                self.beat.moved = looked
            elif self.stalled():
                self.end()
                return
            if self._stragglers is not None:
                self._stragglers.look(self.beat)

    def stalled(self) -> bool:
        """Whether this rank has been silent for too long, or another one has said so of itself."""
        silence = self.beat.silence
        if silence < self.stall_s / 2:
            return False
        if (self.folder / CLAIM).exists():
            return True
        if silence < self.stall_s * PATIENCE.get(self.beat.phase_name, 1):
            return False
        # Others may be doing something that takes longer, such as saving, while this one waits for them.
        phases = [beat["phase"] for beat in self.beats().values() if beat is not None]
        return silence >= self.stall_s * max(PATIENCE.get(phase, 1) for phase in [*phases, self.beat.phase_name])

    def beats(self) -> dict[int, dict[str, Any] | None]:
        """The heartbeat of each rank."""
        return {rank: read_json(heartbeat_file(self.run_dir, rank)) for rank in range(self.world.size)}

    def end(self) -> None:
        """Report, explain where it is this rank's task, and leave the process."""
        seconds = self.beat.silence
        try:
            claim, mine = self._claim()
            self._report(claim["time"], seconds)
            reports = self._reports(claim["time"], ended=not mine)
            if mine:
                self._explain(claim["time"], reports, seconds)
        except Exception as error:  # whatever it is, the run must not stand still for ever
            print(f"pretrain: error: no progress for {seconds:.0f} s; and {error!r}", file=sys.stderr)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        self.leave(STALLED)

    def _claim(self) -> tuple[dict[str, Any], bool]:
        """What the first rank that saw the stall wrote, and whether that is this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        part = self.folder / f".claim-{self.world.rank:05d}"
        part.write_text(json.dumps({"time": stamp, "rank": self.world.rank}))
        try:
            os.link(part, self.folder / CLAIM)  # whole, and for one alone
        except FileExistsError:
            pass
        finally:
            part.unlink()
        claim = read_json(self.folder / CLAIM)
        return claim, claim["rank"] == self.world.rank

    def _report(self, stamp: str, seconds: float) -> None:
        """Write down where this rank is: its stacks for people, the rest for the rank that explains."""
        name = f"{stamp}-rank-{self.world.rank:05d}"
        report = {
            "rank": self.world.rank, "host": platform.node(), "pid": os.getpid(), "step": self.beat.step,
            "phase": self.beat.phase_name, "silence": seconds, **threads(self.beat.main), "collectives": [],
        }  # fmt: skip
        with (self.folder / f"{name}.txt").open("w") as file:
            file.write(f"{json.dumps(report, indent=2)}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            with suppress(Exception):  # torch's own record: of other versions, of other back ends
                report["collectives"] = collectives()
            file.write("\ncollectives:\n" + "".join(f"{json.dumps(each)}\n" for each in report["collectives"]))
        write_json(self.folder / f"{name}.json", report)

    def _reports(self, stamp: str, *, ended: bool) -> dict[int, dict[str, Any]]:
        """The reports of all ranks that can tell. ended: stay until the paragraph is written, too."""
        patience = min(max(self.stall_s / 4, 5.0), 30.0)
        deadline = time.monotonic() + patience * (2 if ended else 1)
        found: dict[int, dict[str, Any]] = {}
        while time.monotonic() < deadline:
            if ended and (self.folder / f"{stamp}.txt").exists():
                break
            for rank in range(self.world.size) if not ended else ():
                if rank not in found and (report := read_json(self.folder / f"{stamp}-rank-{rank:05d}.json")):
                    found[rank] = report
            if len(found) == self.world.size:
                break
            time.sleep(min(0.2, patience / 10))
        return found

    def _explain(self, stamp: str, reports: dict[int, dict[str, Any]], seconds: float) -> None:
        text = explain_stall(reports, self.beats(), seconds)
        print(f"pretrain: error: {text}; stacks: {self.folder}/{stamp}-*", file=sys.stderr, flush=True)
        with suppress(OSError):
            append_end(self.run_dir, "stalled", detail=text, rank=self.world.rank, step=self.beat.step)
        (self.folder / f"{stamp}.txt").write_text(text + "\n")

"""The ranks of one machine as processes: started, watched, told to stop, ended. Imports no torch."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.rundir import first_error, log_folder, rank_log, write_json

PARENT = "PRETRAIN_PARENT"  # process id of what started a rank: the rank ends with it
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
FOLLOW_SECONDS = 2.0  # for the other ranks to fail for the same reason
GRACE_SECONDS = 30.0  # between asking ranks to end and ending them
LOOK_SECONDS = 0.05  # between two looks at a log
FORCED = 3  # a user who asks so many times does not want to wait


@dataclass(frozen=True)
class Failure:
    """The rank of a machine that failed first. code: as of a process, below 0 the signal that killed it; time: seconds
    since 1970.
    """

    rank: int
    world: int
    code: int
    host: str
    time: float

    def __str__(self) -> str:
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"rank {self.rank} of {self.world} died ({how})"


@dataclass
class Ranks:
    """Ranks first .. first + here - 1 of `world`, each the process `command` with `environment`.

    address, port: where rank 0 listens for the others; a restart takes the next port, as the old one may be in use
    still. run_dir, job: logs of the ranks go into its log folder of this job; run_dir None: to the console. echo: show
    rank 0's log on the console. parent: process that this one is to end with, ranks and all (0: none), as SLURM's
    daemon of a step: nobody would end them any more. local: number of the first one on its machine, of per_node (0: all
    are here).
    """

    command: list[str]
    environment: dict[str, str]
    first: int
    here: int
    world: int
    address: str
    port: int
    run_dir: Path | None = None
    job: str | None = None
    restart: int = 0
    echo: bool = True
    parent: int = 0
    local: int = 0
    per_node: int = 0
    asked: list[int] = field(default_factory=list)
    failure: Failure | None = None
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _tail: "Tail | None" = None

    def start(self) -> None:
        """Start them all, unless a signal has come before."""
        self.failure = None
        shared = {
            **self.environment,
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.per_node or self.here),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
            PARENT: str(os.getpid()),
        }
        if self.restart:
            shared["TORCHELASTIC_RESTART_COUNT"] = str(
                self.restart - int(self.environment.get("SLURM_RESTART_COUNT") or 0)
            )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._processes = []
        for index in range(self.here):
            if not self.asked:
                own = {"RANK": str(self.first + index), "LOCAL_RANK": str(self.local + index)}
                self._processes.append(self._popen(self.first + index, shared | own))
        if self.folder is not None and self.first == 0 and self.echo:
            self._tail = Tail(rank_log(self.folder, 0))

    @property
    def folder(self) -> Path | None:
        """The log folder of this start."""
        return None if self.run_dir is None else log_folder(self.run_dir, self.job, self.restart)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _popen(self, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        if self.folder is None:
            return subprocess.Popen(self.command, env=environment)
        with rank_log(self.folder, rank).open("ab") as log:
            return subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def restart_all(self) -> None:
        """Start them anew, once all have ended."""
        self.restart += 1
        self.port += 2  # the port in between may be another's, see `launch.agent`
        self.start()

    def handle_signals(self) -> None:
        """Pass SIGINT and SIGTERM on to the ranks from now on, also to those that start while one is handled."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        self._send(signal.SIGKILL if len(self.asked) >= FORCED else number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def look(self) -> bool:
        """Whether they go on. After the first failure of one the others are ended, and `failure` says which it was."""
        if self.parent and os.getppid() != self.parent:
            self._send(signal.SIGKILL)
            sys.exit(f"pretrain: process {self.parent}, which started this one, is gone")
        codes = [process.poll() for process in self._processes]
        if any(codes):
            self._end()
        elif None in codes:
            return True
        self._close()
        return False

    def _close(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def wait(self) -> int:
        """Watch them to their end; returns the exit code of this machine's ranks."""
        while self.look():
            time.sleep(LOOK_SECONDS)
        return self.code

    @property
    def code(self) -> int:
        """0; or that of the rank that failed: 1 where a signal killed it."""
        return 0 if self.failure is None else self.failure.code if self.failure.code > 0 else 1

    def _end(self) -> None:
        """A failing rank gives the others a moment to fail for the same reason, then they are ended."""
        gone = [process for process in self._processes if process.poll()]
        # Killed by a signal: what made the others fail.
        first = min(gone, key=lambda process: process.returncode)
        rank = self.first + self._processes.index(first)
        self.failure = Failure(rank, self.world, first.returncode, node_name(), time.time())
        deadline = time.monotonic() + FOLLOW_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def stop(self) -> None:
        """End what still runs, as after an error of what watches them."""
        self._send(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._close()

    def tell(self) -> None:
        """The first error of any rank, last on the console; and, beside the logs, which rank failed here."""
        if self.failure is None or -self.failure.code in self.asked:
            return
        folder = self.folder
        if folder is not None:
            write_json(folder / f"failed-{self.failure.rank:05d}.json", vars(self.failure))
        said = None if folder is None else first_error(folder)
        if self.failure.code < 0 or said is None:
            if self.failure.code not in (1, 2) or folder is not None:  # those have said why themselves
                self._print(f"pretrain: {self.failure} on {self.failure.host}; the others were ended", folder)
        else:
            who = "" if said.line.startswith("rank ") else f"rank {said.rank} of {self.world}: "
            self._print(f"pretrain: error: {who}{said.line}", said.path)

    def _print(self, text: str, where: Path | None) -> None:
        print(text if where is None else f"{text}\n  logs: {where}", file=sys.stderr, flush=True)


class Tail:
    """Shows on the console what a growing file gets, until it is closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._over = path, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show the rest."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._path.exists():
            if self._over.wait(LOOK_SECONDS):
                return
        with self._path.open("rb") as file:
            while True:
                last = self._over.is_set()  # what was written before is read below
                while part := file.read(1 << 16):
                    sys.stdout.buffer.write(part)
                    sys.stdout.flush()
                if last:
                    return
                self._over.wait(LOOK_SECONDS)


def node_name() -> str:
    """This machine, as SLURM calls it where SLURM runs."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def follow_parent() -> None:
    """Have the system kill this rank when what started it is gone: nobody would end it any more."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(f"pretrain: process {parent}, which started this rank, is gone")

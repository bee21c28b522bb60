"""pretrain logs"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.rundir import first_error, log_folders, lost_contact, rank_log
from launch.slurm.jobs import find_jobs
from launch.starts import STOPPED
from launch.status import RunStatus, is_run, read_all

LOOK_SECONDS = 0.2  # between two looks at a log that is followed
ALIVE_SECONDS = 5.0  # between two questions whether the run goes on
BLOCK = 1 << 16


def logs(args: argparse.Namespace) -> None:
    """Print the end of a rank's log; of a run that died, the first error of any rank before it."""
    run_dir = Path(args.run)
    if not is_run(run_dir):
        raise FileNotFoundError(f"{run_dir} is no run: give the folder of a run, such as runs/demo")
    if args.lines < 0:
        raise ValueError(f"-n {args.lines}: give a number of lines, 0 or more")
    folder = _folder(run_dir, args.job)
    path = _log(folder, args.rank)
    status = read_all([run_dir])[0]
    latest = args.job is None
    for line in _died(status, folder) if latest and not status.going else ():
        print(line)
    sys.stdout.flush()
    position = _print_end(path, args.lines)
    if args.follow:
        try:
            _follow(run_dir, path, position, args.rank if latest else None)
        except KeyboardInterrupt:
            return


def _folder(run_dir: Path, job: str | None) -> Path:
    """The newest folder of logs, of a job if named: 12, 12.1 (its second start), or 12_3 of an array."""
    every = log_folders(run_dir)
    if not every:
        raise FileNotFoundError(
            f"{run_dir} has no logs: a single process started by pretrain run prints on its console alone"
        )
    if job is None:
        return every[-1]
    numbers = [job, *(found.number for found in (find_jobs([job])[0] if "_" in job else []) if found.job == job)]
    found = [folder for number in numbers for folder in log_folders(run_dir, number)]
    if not found:
        raise FileNotFoundError(f"--job {job}: {run_dir} has logs of {', '.join(folder.name for folder in every)}")
    return found[-1]


def _log(folder: Path, rank: int) -> Path:
    path = rank_log(folder, rank)
    if path.is_file():
        return path
    ranks = sorted(int(found.stem[5:]) for found in folder.glob("rank-*.log"))
    if ranks:
        raise FileNotFoundError(f"--rank {rank}: {folder} has logs of ranks {ranks[0]} to {ranks[-1]}")
    # The ranks never came up: what started them says why.
    others = sorted(found for found in folder.glob("*.log") if found.is_file())
    if not others:
        raise FileNotFoundError(f"{folder} has no logs yet")
    return next((found for found in others if found.name == "supervisor.log"), others[0])


def _died(status: RunStatus, folder: Path) -> Iterator[str]:
    """What a run that ended badly died of: the first error of any rank on top."""
    last = status.starts[-1] if status.starts else None
    if last is not None and last.reason in STOPPED:
        return
    found = first_error(folder)
    if found is not None and not lost_contact(found.line):
        yield f"first error: rank {found.rank}: {found.line}"
        yield f"  in {found.path}"
    elif status.why:
        yield f"{status.state}: {status.why}"


def _print_end(path: Path, lines: int) -> int:
    """Print the last lines; returns where the file ended."""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        tail = b""
        while position and tail.count(b"\n") <= lines:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            tail = file.read(size) + tail
    _write(b"".join(tail.splitlines(keepends=True)[-lines:]) if lines else b"")
    return end


def _follow(run_dir: Path, path: Path, position: int, rank: int | None) -> None:
    """Print what is added, until the run has ended; with a rank also that of starts that follow."""
    looked, over = time.monotonic(), None
    while True:
        with path.open("rb") as file:
            file.seek(position)
            while block := file.read(BLOCK):
                _write(block)
                position += len(block)
        if over is not None:  # and what it printed last stands there
            for line in _died(over, path.parent):
                print(line, flush=True)
            return
        newest = log_folders(run_dir)[-1]
        if rank is not None and newest != path.parent and rank_log(newest, rank).is_file():
            path, position = rank_log(newest, rank), 0
            _write(f"--- {newest.name} ---\n".encode())
        elif time.monotonic() - looked > ALIVE_SECONDS:
            looked = time.monotonic()
            status = read_all([run_dir])[0]
            over = None if status.going else status
        time.sleep(LOOK_SECONDS)


def _write(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()

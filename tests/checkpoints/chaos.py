"""Kills a two-process run again and again, at random moments, and resumes it each time.

    python -m tests.checkpoints.chaos [--kills 500] [--seed 0] [--command-every 25]

After every kill each checkpoint is read whole, and the newest is no older than before. A run that comes to its end must
have the weights and the optimizer state, to the bit, of one that was never interrupted; then another begins. Ranks are
forked from a process that has imported torch, as imports would take most of the time; every 25th start is the command
`pretrain run --nproc 2` itself. Half of the runs save in the background.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from launch.commands.verify import PRELOADED
from parallel.world import World
from pretrain.config import resolve
from pretrain.data import build_tiny_shards
from pretrain.train import train
from tests import ranks  # sets its own list when it is imported: before this one, not after
from tests.small import small_overrides

WORLD, STEPS = 2, 12
LIMIT = 240  # seconds for a start and all steps, on a busy machine
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [*PRELOADED, "pretrain.train", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel", ranks.__name__]
)


@dataclass
class Figures:
    kills: int = 0
    completed: int = 0  # runs that came to their end, equal to the uninterrupted one
    resumed_at: Counter[int] = field(default_factory=Counter)  # newest step -> kills that left it
    torn: int = 0  # kills that left an unfinished save behind
    checked: int = 0  # checkpoints read whole

    def __str__(self) -> str:
        middle = sum(count for step, count in self.resumed_at.items() if 0 < step < STEPS)
        return (
            f"{self.kills} kills, {self.torn} within a save, {middle} between the first and the last checkpoint; "
            f"{self.checked} checkpoints read, none damaged; {self.completed} runs completed, all equal to the bit"
        )


def overrides(run_dir: Path, shards: Path, background: bool) -> list[str]:
    return [
        *small_overrides(run_dir, shards),
        f"train.steps={STEPS}",
        "train.precision=fp32",
        "model.hidden=24",
        "checkpoint.every=1",
        "checkpoint.keep=2",
        f"checkpoint.async={str(background).lower()}",
    ]


def _train_on_rank(chosen: list[str], rank: int, meeting: str, log: str) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=LIMIT))
    train(resolve("tiny", chosen)[0], World(rank, WORLD, torch.device("cpu")))
    dist.barrier()
    os._exit(0)


class Forked:
    """The ranks of a run, forked."""

    def __init__(self, chosen: list[str], meeting: Path, log: Path) -> None:
        meeting.unlink(missing_ok=True)
        places = [(chosen, rank, str(meeting), str(log)) for rank in range(WORLD)]
        self._ranks = [_context.Process(target=_train_on_rank, args=place, daemon=True) for place in places]
        for process in self._ranks:
            process.start()

    def wait(self, seconds: float) -> bool:
        """Whether the run came to its end by then."""
        deadline = time.monotonic() + seconds
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return all(process.exitcode == 0 for process in self._ranks)

    def kill(self, rng: random.Random) -> None:
        """Both ranks at once, or one and a moment later the other: it may be in the middle of anything."""
        first = rng.sample(self._ranks, rng.choice((1, 2)))
        for process in first:
            process.kill()
        if len(first) < WORLD:
            time.sleep(rng.uniform(0.0, 0.3))
        for process in self._ranks:
            process.kill()
            process.join()


class Command:
    """`pretrain run`, and the ranks that it starts."""

    def __init__(self, chosen: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "launch.cli", "run", "tiny", "--nproc", str(WORLD), *chosen]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def wait(self, seconds: float) -> bool:
        try:
            return self._process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False

    def kill(self, rng: random.Random) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def fingerprint(run_dir: Path) -> dict[str, object]:
    """Of all tensors of the last checkpoint, by file."""
    manifest = Manifest.read(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    return {name: entry for name, entry in manifest.files.items() if name.endswith(".safetensors")}


def check_left(run_dir: Path, before: int, figures: Figures) -> int:
    """Everything that a kill left is whole; returns the step of the newest checkpoint, or 0."""
    folder = run_dir / "checkpoints"
    store = CheckpointStore(folder)
    infos = store.list()
    for info in infos:
        problems = store.verify(info.step)
        assert not problems, (run_dir, figures.kills, problems)
        figures.checked += 1
    newest = store.newest_whole() or 0
    assert newest >= before, (run_dir, figures.kills, before, newest)
    if folder.is_dir():
        figures.torn += any(path.name.startswith(".") for path in folder.iterdir())
    figures.resumed_at[newest] += 1
    return newest


def chaos(folder: Path, shards: Path, kills: int, seed: int = 0, command_every: int = 0) -> Figures:
    """Kill `kills` times, then let the last run end. AssertionError: a checkpoint is damaged, or weights differ."""
    rng, figures = random.Random(seed), Figures()
    log, starts = folder / "log", 0

    def start(run_dir: Path, background: bool) -> Forked | Command:
        nonlocal starts
        starts += 1
        chosen = overrides(run_dir, shards, background)
        by_command = command_every and starts % command_every == 0
        return Command(chosen, log) if by_command else Forked(chosen, folder / "meeting", log)

    def finish(run_dir: Path, background: bool) -> float:
        begin = time.monotonic()
        assert start(run_dir, background).wait(LIMIT), f"a run did not end; see {log}"
        return time.monotonic() - begin

    whole = folder / "whole"
    finish(whole, background=False)
    expected, usual = fingerprint(whole), finish(folder / "again", background=True)
    while figures.kills < kills or figures.completed == 0:
        number = figures.completed
        run_dir, background, newest = folder / f"run-{number}", number % 2 == 0, 0
        ended = False
        while figures.kills < kills and not ended:
            run = start(run_dir, background)
            slow = 6.0 if isinstance(run, Command) else 0.0  # the imports
            if not (ended := run.wait(slow + rng.uniform(0.0, usual))):
                run.kill(rng)
                figures.kills += 1
                newest = check_left(run_dir, newest, figures)
        if not ended:
            finish(run_dir, background)
        assert fingerprint(run_dir) == expected, f"{run_dir} has other weights than the run that was never killed"
        figures.completed += 1
        shutil.rmtree(run_dir)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command-every", type=int, default=25, help="every so many starts are the command itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        build_tiny_shards(shards)
        start = time.monotonic()
        figures = chaos(Path(folder), shards, options.kills, options.seed, options.command_every)
        print(f"{figures}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Runs that stand still: real ranks, one of which hangs or is stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import free_port
from launch.rundir import lost_contact, read_ends, read_lines
from tests.small import small_overrides

pytestmark = pytest.mark.slow  # torch is imported by each rank
ROOT = Path(__file__).parent.parent.parent
STALL = 6
SLOW = ["train.global_batch=6", "train.steps=40", "log.every=4"]


class Started:
    """Ranks of one run, of which `rank` has the fault. Their output goes to files."""

    def __init__(self, folder: Path, shards: Path, world: int, fault: str = "", rank: int = -1, *more: str) -> None:
        self.run_dir = folder / "run"
        arguments = ["run", "tiny", *small_overrides(self.run_dir, shards), "train.micro_batch=2", *more]
        fixed = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in fixed.items()} | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.launch.planted", fault, str(rank), *arguments]
        self.outputs = [folder / f"rank-{i}.txt" for i in range(world)]
        self.ranks = []
        for i in range(world):
            with self.outputs[i].open("w") as out:
                own = environment | {"RANK": str(i), "LOCAL_RANK": str(i)}
                self.ranks.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def wait(self, ranks: list[int], timeout: float = 150) -> list[int]:
        deadline = time.monotonic() + timeout
        return [self.ranks[i].wait(max(0.1, deadline - time.monotonic())) for i in ranks]

    def wait_for(self, path: Path, lines: int, timeout: float = 150) -> None:
        deadline = time.monotonic() + timeout
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            assert time.monotonic() < deadline and self.ranks[0].poll() is None, self.said(0)
            time.sleep(0.1)

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def end(self) -> str:
        """The one end that was recorded, but for ranks that saw another go before they went."""
        ends = [end for end in read_ends(self.run_dir) if not lost_contact(str(end["detail"]))]
        assert [end["reason"] for end in ends] == ["stalled"]
        return ends[0]["detail"]


@pytest.fixture
def own_shards(tmp_path, tiny_shards):
    """That a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def stall(seconds: float = STALL) -> str:
    return f"watchdog.stall_s={seconds}"


def test_names_the_rank_that_does_not_come_to_a_collective(tmp_path, tiny_shards):
    """It sleeps before one. All exit to be started anew, after each has dumped its stacks."""
    with Started(tmp_path, tiny_shards, 3, "sleep_before_step", 1, "train.global_batch=6", stall()) as run:
        assert run.wait([0, 1, 2]) == [75, 75, 75]
        text = run.end()
    assert "rank 1 has not come to all_reduce (" in text
    assert "in which ranks 0, 2 wait" in text and "of ranks 0-2" in text
    assert 'in phase "step" after step 2 at pretrain/train.py' in text
    assert sum(f"pretrain: error: {text}" in run.said(rank) for rank in range(3)) == 1
    stacks = sorted((run.run_dir / "stacks").glob("*-rank-*.txt"))
    assert len(stacks) == 3
    assert "tests/launch/planted.py" in stacks[1].read_text() and "Thread 0x" in stacks[1].read_text()


def test_others_name_a_rank_that_is_stopped(tmp_path, tiny_shards):
    """Rank 0, which would otherwise speak; the file of its heartbeat tells where it was."""
    with Started(tmp_path, tiny_shards, 2, "none", 0, "train.steps=100000", stall()) as run:
        run.wait_for(run.run_dir / "metrics.jsonl", 3)
        run.ranks[0].send_signal(signal.SIGSTOP)
        assert run.wait([1]) == [75]
        text = run.end()
    assert "rank 0 has not come to all_" in text and "in which rank 1 waits" in text
    assert f"process {run.ranks[0].pid}) does not respond: it is stopped" in text
    assert 'in phase "' in text and "its last sign came" in text


@pytest.mark.parametrize(
    ("fault", "phase", "at"),
    [
        ("shard_without_end", "waiting for data", "shards/train-00000.tar"),
        ("save_without_end", "saving", "pretrain/saving.py"),
    ],
)
def test_names_the_shard_or_the_save_that_hangs(tmp_path, own_shards, fault, phase, at):
    with Started(tmp_path, own_shards, 2, fault, 0, "train.steps=3", "checkpoint.every=2", stall(4)) as run:
        codes = run.wait([0, 1])
        text = run.end()
    assert codes == [75, 75]
    assert f'in phase "{phase}"' in text and at in text


def test_a_slow_rank_is_logged(tmp_path, tiny_shards):
    """By the time that it does not wait for others; the steps of all take equally long."""
    with Started(
        tmp_path, tiny_shards, 3, "slow_forward", 2, "train.global_batch=6", "train.steps=40", "log.every=4"
    ) as run:
        assert run.wait([0, 1, 2]) == [0, 0, 0], run.said(0)
    rows = read_lines(run.run_dir / "stragglers.jsonl")
    assert rows and {row["rank"] for row in rows} == {2}
    assert rows[0]["seconds"] > 0.2 and rows[0]["host"]
    assert run.said(0).count("straggler: rank 2 on ") == 1

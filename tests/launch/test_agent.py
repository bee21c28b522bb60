"""Ranks of this machine: restarts, logs, whose error is shown, and that none outlives what started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.local import run_folder
from launch.ranks import Ranks
from pretrain.config import recipe_names, resolve
from pretrain.history import read_lines
from tests.launch.jobs import small_job, weights

SCRIPT = """
import os, signal, sys, time
rank, start = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
print(f"rank {rank} start {start}", flush=True)
"""


def ranks(run_dir: Path | None, script: str, here: int = 2) -> Ranks:
    command = [sys.executable, "-c", SCRIPT + script]
    return Ranks(command, dict(os.environ), 0, here, here, "127.0.0.1", 29600, run_dir, "local-1")


def test_each_rank_has_a_log_and_the_console_shows_the_first(tmp_path, capfdbinary):
    started = ranks(tmp_path, "time.sleep(0.2); print('é' * 5000, 'end')")
    started.start()
    assert started.wait() == 0
    shown = capfdbinary.readouterr().out.decode()
    assert shown == (tmp_path / "logs/local-1.0/rank-00000.log").read_text()
    assert shown.startswith("rank 0 start 0\n") and shown.endswith(" end\n")
    assert (tmp_path / "logs/local-1.0/rank-00001.log").read_text().startswith("rank 1 start 0\n")


def test_the_rank_that_a_signal_killed_comes_before_those_that_lost_it(tmp_path, capsys):
    script = "time.sleep(0.3 * rank); sys.exit(1) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)"
    started = ranks(tmp_path, f"\ntry: time.sleep(0.5 * (rank == 0))\nfinally: pass\n{script}")
    started.start()
    assert started.wait() == 1
    started.tell()
    errors = capsys.readouterr().err
    assert "pretrain: rank 1 of 2 died (signal 9)" in errors and str(tmp_path / "logs/local-1.0") in errors
    failed = json.loads((tmp_path / "logs/local-1.0/failed-00001.json").read_text())
    assert (failed["rank"], failed["code"]) == (1, -9)


def test_an_error_is_shown_last_with_rank_and_log_and_keeps_its_code(tmp_path, capsys):
    started = ranks(tmp_path, "\nif rank == 1: sys.exit('pretrain: error: shard 7 is torn') or 1\ntime.sleep(60)")
    started.start()
    begin = time.monotonic()
    assert started.wait() == 1
    assert time.monotonic() - begin < 30  # the other one was ended
    started.tell()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["pretrain: error: rank 1 of 2: shard 7 is torn", f"  logs: {started.folder}/rank-00001.log"]


def test_the_folder_of_a_run_is_known_without_torch(tmp_path):
    for name in recipe_names():
        assert run_folder(name, []) == Path(resolve(name)[0].run.dir)
    (tmp_path / "base.toml").write_text('[run]\ndir = "a b"\n')
    (tmp_path / "own.toml").write_text('base = "base"\n[train]\nsteps = 3\n')
    recipe = str(tmp_path / "own.toml")
    assert run_folder(recipe, []) == Path("a b") == Path(resolve(recipe)[0].run.dir)
    assert run_folder(recipe, ['run.dir="x"', "run.dir=runs/y", "train.steps=4"]) == Path("runs/y")
    assert run_folder("no such recipe", []) is None
    (tmp_path / "own.toml").write_text('base = "own"\n')
    assert run_folder(recipe, []) is None  # in a circle


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "launch.cli", "run", "tiny", *arguments, "--nproc", "2"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_log(started: subprocess.Popen[str], run_dir: Path, line: str) -> None:
    deadline = time.monotonic() + 120
    while not any(line in path.read_text() for path in run_dir.glob("logs/*.0/rank-00000.log")):
        if started.poll() is not None or time.monotonic() > deadline:
            started.kill()
            pytest.fail(started.communicate()[0])
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_restarts_all_from_the_last_checkpoint(tmp_path, tiny_shards):
    length = ["train.steps=40", "checkpoint.every=10", "checkpoint.async=false"]
    run_dir = tmp_path / "run"
    started = start([*small_job(run_dir, tiny_shards), *length, "--restarts", "1"])
    wait_for_log(started, run_dir, "saved")
    psutil.Process(started.pid).children()[1].send_signal(signal.SIGKILL)
    output, _ = started.communicate(timeout=150)
    assert started.returncode == 0, output
    assert "rank 1 of 2 died (signal 9)" in output and "restarting from the last checkpoint" in output
    assert "resuming" in output and [line["restart"] for line in read_lines(run_dir / "starts.jsonl")] == [0, 1]
    whole = start([*small_job(tmp_path / "whole", tiny_shards), *length])
    output, _ = whole.communicate(timeout=150)
    assert whole.returncode == 0, output
    assert weights(run_dir) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_mistakes_and_stops_are_not_restarted(tmp_path, tiny_shards):
    arguments = [*small_job(tmp_path / "mistake", tiny_shards), "optim.lr=1e30", "train.steps=50", "--restarts", "3"]
    mistaken = start(arguments)
    output, _ = mistaken.communicate(timeout=150)
    assert mistaken.returncode == 2 and "restarting" not in output
    assert "resume there with a lower optim.lr" in output.splitlines()[-2]
    run_dir = tmp_path / "stopped"
    stopped = start([*small_job(run_dir, tiny_shards), "train.steps=100000", "--restarts", "3"])
    wait_for_log(stopped, run_dir, "step")
    stopped.terminate()
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 0 and "by a signal" in output and "restarting" not in output


@pytest.mark.slow
def test_ranks_end_with_what_started_them(tmp_path, tiny_shards):
    run_dir = tmp_path / "run"
    started = start([*small_job(run_dir, tiny_shards), "train.steps=100000"])
    wait_for_log(started, run_dir, "step")
    children = psutil.Process(started.pid).children()
    assert len(children) == 2
    started.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive

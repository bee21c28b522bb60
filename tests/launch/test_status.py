"""pretrain status, cancel, logs, on real runs of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.holder import find_holder
from launch.rundir import write_json
from launch.slurm.sweep import describe_sweep, points_of
from launch.status import find_runs, read_all
from parallel.world import World
from pretrain.config import resolve
from pretrain.lock import RunLock
from pretrain.metrics import Metrics
from pretrain.train import train
from tests.ranks import RankError, run_ranks
from tests.small import small_overrides

ALONE = World(0, 1, torch.device("cpu"))


def start(run_dir: Path, shards: Path, *overrides: str) -> None:
    train(resolve("tiny", [*small_overrides(run_dir, shards), *overrides])[0], ALONE)


def killed_at_step_3(run_dir: Path, shards: Path) -> None:
    log = Metrics.log

    def log_and_die(self, step, values):
        log(self, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.log = log_and_die
    start(run_dir, shards, "train.steps=8", "checkpoint.every=2", "checkpoint.async=false")


def pretrain(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: str) -> str:
    """The line that a user's mistake is answered with."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_run_from_its_start_to_its_end(tmp_path, tiny_shards, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    seen = []
    log = Metrics.log

    def look(self, step, values):
        log(self, step, values)
        seen.extend(read_all([run_dir]))

    monkeypatch.setattr(Metrics, "log", look)
    start(run_dir, tiny_shards, "train.steps=8", "train.stop_at=4", "checkpoint.every=2")
    assert [run.state for run in seen] == ["running"] * 4
    assert [(run.step, run.target) for run in seen[1:]] == [(1, 4), (2, 4), (3, 4)]
    assert seen[3].eta > 0 and seen[3].tokens_per_s > 0 and f"process {os.getpid()} on" in seen[3].why
    (stopped,) = read_all([run_dir])
    assert (stopped.state, stopped.why, stopped.step, stopped.checkpoint) == ("stopped", "stop_at", 4, 4)
    assert stopped.eta is None and find_holder(run_dir) is None

    start(run_dir, tiny_shards, "train.steps=8")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    (record,) = json.loads(pretrain(capsys, "status", str(run_dir), "--json"))
    told = {"state": "finished", "step": 8, "target": 8, "loss": last["loss"], "checkpoint": 8, "restarts": 1}
    assert told.items() <= record.items()
    assert [(each["step"], each["end_step"], each["reason"]) for each in record["starts"]] == [
        (0, 4, "stop_at"),
        (4, 8, "finished"),
    ]
    shown = pretrain(capsys, "status", str(run_dir))
    assert "8/8" in shown and f"loss {last['loss']:.4f}" in shown and "stop_at" in shown


def test_a_run_that_was_killed_hard_is_shown_as_such(tmp_path, tiny_shards, capsys):
    run_dir = tmp_path / "run"
    with pytest.raises(RankError, match="rank 0"):
        run_ranks(killed_at_step_3, 1, run_dir, tiny_shards, timeout=60)
    (run,) = read_all([run_dir])
    assert (run.state, run.checkpoint, run.target) == ("lost", 2, 8)
    assert find_holder(run_dir).alive is False  # its lock still names it
    assert "killed hard" in pretrain(capsys, "status", str(run_dir))
    assert "nothing of it is running" in fails(capsys, "cancel", str(run_dir))
    # The number of the dead process may be another's by now.
    (run_dir / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid()}))
    os.utime(run_dir / ".lock", (1e9, 1e9))
    assert read_all([run_dir])[0].state == "lost"


def test_a_run_that_fails_says_why(tmp_path, tiny_shards):
    with pytest.raises(ValueError, match="is nan at step"):
        start(tmp_path / "run", tiny_shards, "train.steps=8", "optim.lr=1e30", "optim.clip_grad_norm=0")
    (run,) = read_all([tmp_path / "run"])
    assert run.state == "failed" and run.why.startswith("error (rank 0: ") and "is nan at step" in run.why


def test_sweeps_are_tables_of_results(tmp_path, tiny_shards, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = Path("runs/sweep")
    found = points_of(["optim.lr=1e-3,1e-2", "run.seed=1..2"], sweep)
    write_json(sweep / "sweep.json", describe_sweep(found))
    for point in found[:3]:
        start(point.run_dir, tiny_shards, "train.steps=2", *point.overrides)
    start(Path("runs/deep/other"), tiny_shards, "train.steps=2")
    assert find_runs(Path("runs")) == [Path("runs/deep/other"), sweep]
    lines = pretrain(capsys, "status", str(sweep)).splitlines()
    assert lines[0].split()[:5] == ["run", "optim.lr", "run.seed", "state", "step"]
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["runs/sweep/000", "1e-3", "1", "finished", "2/2"],
        ["runs/sweep/001", "1e-3", "2", "finished", "2/2"],
        ["runs/sweep/002", "1e-2", "1", "finished", "2/2"],
    ]
    assert lines[4].split()[:4] == ["runs/sweep/003", "1e-2", "2", "new"]
    everything = json.loads(pretrain(capsys, "status", "--json"))
    assert len(everything) == 5 and everything[1]["overrides"] == ["optim.lr=1e-3", "run.seed=1"]
    assert "runs/deep/other" in pretrain(capsys, "status", "--watch")  # nothing goes on: shown once


def test_mistakes_are_said_in_one_line(tmp_path, tiny_shards, capsys):
    for command in ("status", "cancel", "logs"):
        assert str(tmp_path / "none") in fails(capsys, command, str(tmp_path / "none"))
    start(tmp_path / "run", tiny_shards, "train.steps=1")
    run = str(tmp_path / "run")
    assert "nothing of it is running" in fails(capsys, "cancel", run)
    assert "has no logs" in fails(capsys, "logs", run)
    logs = tmp_path / "run/logs/12.0"
    logs.mkdir(parents=True)
    (logs / "rank-00000.log").write_text("one\ntwo\nthree\n")
    assert pretrain(capsys, "logs", run, "-n", "2") == "two\nthree\n"
    assert "logs of ranks 0 to 0" in fails(capsys, "logs", run, "--rank", "3")
    assert "has logs of 12.0" in fails(capsys, "logs", run, "--job", "13")
    assert "0 or more" in fails(capsys, "logs", run, "-n", "-1")
    (tmp_path / "run/.lock").write_text('{"host": "elsewhere", "pid": 1}')
    assert "cancel it there" in fails(capsys, "cancel", run)
    (tmp_path / "run/starts.jsonl").write_text('{"step": 0, "host": "old"}\n')  # of a version without times
    (tmp_path / "run/ends.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe{"step"')
    assert read_all([tmp_path / "run"])[0].step == 1


def test_a_lock_names_its_holder_while_it_is_held(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    holder = find_holder(tmp_path)
    assert holder is not None and (holder.pid, holder.alive, holder.launcher()) == (os.getpid(), True, os.getpid())
    with pytest.raises(ValueError, match="another process"):
        RunLock(tmp_path).take()
    assert find_holder(tmp_path) == holder  # who was refused has changed nothing
    lock.release()
    assert find_holder(tmp_path) is None


@pytest.mark.slow
def test_cancel_and_logs_of_two_ranks(tmp_path, tiny_shards, capsys):
    run_dir = tmp_path / "run"
    overrides = [*small_overrides(run_dir, tiny_shards), "train.steps=100000"]
    command = [sys.executable, "-P", "-m", "launch.cli", "run", "tiny", "--nproc", "2", "--restarts", "2", *overrides]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as launcher:
        try:
            deadline = time.monotonic() + 150
            while (read_all([run_dir])[0].step or 0) < 3 and launcher.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            (run,) = read_all([run_dir])
            assert run.state == "running" and find_holder(run_dir).launcher() == launcher.pid
            follow = [sys.executable, "-P", "-m", "launch.cli", "logs", str(run_dir), "--follow", "-n", "0"]
            with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as following:
                time.sleep(1)
                assert f"asked process {launcher.pid} to save and leave" in pretrain(capsys, "cancel", str(run_dir))
                assert launcher.wait(60) == 0
                said = following.communicate(timeout=60)[0]
        finally:
            launcher.kill()
    assert "by a signal; resume with" in said
    (run,) = read_all([run_dir])
    assert (run.state, run.why, run.restarts) == ("stopped", "signal (SIGTERM)", 0)
    assert run.checkpoint == run.step
    assert "stopped at step" in pretrain(capsys, "logs", str(run_dir), "-n", "3")
    assert pretrain(capsys, "logs", str(run_dir), "--rank", "1") == ""  # it has nothing to say

"""pretrain status, cancel, logs of jobs on a real cluster."""

import json
import subprocess
from pathlib import Path

import pytest

from launch.status import RunStatus, read_all
from tests.launch.jobs import TrainingJob, start_job
from tests.launch.test_status import fails, pretrain
from tests.slurm.cluster import wait_until
from tests.small import small_overrides

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick_ranks(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def status_of(run_dir: Path) -> RunStatus:
    return read_all([run_dir])[0]


def wait_for_state(job: TrainingJob, state: str, timeout: float = 150) -> RunStatus:
    job.wait_for(lambda: status_of(job.run_dir).state == state, timeout)
    return status_of(job.run_dir)


def test_a_job_from_the_queue_to_its_cancelling(slurm, tmp_path, tiny_shards, capsys):
    everything = slurm.submit("--nodes=3", "--exclusive", "--wrap=sleep 600")
    endless = ("train.steps=100000", "checkpoint.every=10", "checkpoint.async=false")
    job = start_job(slurm, tmp_path / "run", tiny_shards, *endless)
    queued = status_of(job.run_dir)
    assert (queued.state, queued.step, queued.target, queued.starts) == ("queued", None, 100000, ())
    assert queued.why.startswith("waits: ")

    sweep = tmp_path / "sweep"
    options = ["--sweep", "optim.lr=1e-3,1e-2", "--nodes", "1", "--ranks-per-node", "1", "--cpus-per-rank", "1"]
    assert "job" in pretrain(capsys, "submit", "tiny", *small_overrides(sweep, tiny_shards), *options)
    points = json.loads(pretrain(capsys, "status", str(sweep), "--json"))
    assert [(point["state"], point["overrides"]) for point in points] == [
        ("queued", ["optim.lr=1e-3"]),
        ("queued", ["optim.lr=1e-2"]),
    ]
    assert "cancelled job" in pretrain(capsys, "cancel", str(sweep / "001"))
    assert [status_of(sweep / name).state for name in ("000", "001")] == ["queued", "stopped"]
    assert "cancelled job" in pretrain(capsys, "cancel", str(sweep))
    for name in ("000", "001"):
        assert status_of(sweep / name).why == "preempted or cancelled (cancelled while it waited)"
    assert "nothing of it is running" in fails(capsys, "cancel", str(sweep))

    subprocess.run(["scancel", str(everything)], check=True)
    job.wait_for_step(12, 200)
    running = wait_for_state(job, "running")
    assert running.why == f"job {job.id} on n[1-2]" and running.starts[0].world_size == 2
    assert running.eta is not None and running.phase is not None
    job.ranks("n2")[-1].kill()
    job.wait_for(lambda: len(status_of(job.run_dir).starts) == 2, 200)
    again = wait_for_state(job, "running")
    assert again.restarts == 1 and again.starts[0].reason == "rank lost"
    assert "signal 9" in (again.starts[0].detail or "") and (again.starts[1].step or 0) >= 10
    shown = pretrain(capsys, "status", str(job.run_dir))
    assert "rank lost: " in shown and f"{job.id}.1" in shown and "RUNNING" in shown

    job.wait_for_step((again.starts[1].step or 0) + 2)
    assert f"asked job {job.id} to save and leave" in pretrain(capsys, "cancel", str(job.run_dir))
    job.finish()
    stopped = status_of(job.run_dir)
    assert (stopped.state, stopped.why) == ("stopped", "preempted or cancelled")
    assert stopped.checkpoint == stopped.step
    assert "stopped at step" in pretrain(capsys, "logs", str(job.run_dir), "-n", "5")
    assert "step " in pretrain(capsys, "logs", str(job.run_dir), "--job", f"{job.id}.0")


def test_a_job_that_fails_says_why(slurm, tmp_path, tiny_shards, capsys):
    broken = ("train.steps=20", "optim.lr=1e30", "optim.clip_grad_norm=0")
    job = start_job(slurm, tmp_path / "run", tiny_shards, *broken, max_requeues=0)
    wait_until(lambda: slurm.job(job.id).get("JobState") == "FAILED", 150, job.report)
    failed = status_of(job.run_dir)
    assert failed.state == "failed" and "is nan at step" in failed.why
    first = pretrain(capsys, "logs", str(job.run_dir), "--rank", "1").splitlines()[0]
    assert first.startswith("first error: rank ") and "is nan at step" in first

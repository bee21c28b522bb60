"""Jobs on a real cluster that lose ranks, nodes and time, and train to the end."""

import os
import subprocess
import sys

import pytest

from launch.cli import main
from launch.slurm.recipe import fewer_nodes, goal
from pretrain.history import read_ends
from tests.launch.jobs import TrainingJob, small_job, start_job, weights

pytestmark = pytest.mark.slow
# In place of the Python of the job: its health check finds n1 slow, and has time to come together here.
SLOW_N1 = f"""#!{sys.executable}
import os, sys
if sys.argv[1:4] == ["-P", "-m", "launch.health"]:
    import launch.probes
    launch.probes.time_links = lambda: None  # of a busy machine they say nothing
    launch.probes.time_matmul = lambda device: 9.0 if os.environ["SLURMD_NODENAME"] == "n1" else 1.0
    import launch.health
    launch.health.JOIN_SECONDS = launch.health.LIMIT = 40.0
    sys.exit(launch.health.main(sys.argv[4:]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
ENDLESS = ("train.steps=100000", "checkpoint.every=10", "checkpoint.async=false")


@pytest.fixture(autouse=True)
def quick_ranks(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the nodes are on one machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def uninterrupted(run_dir, shards, *overrides: str) -> dict[str, bytes]:
    """Weights of the same run on two ranks of one machine."""
    arguments = ["run", "tiny", *small_job(run_dir, shards), *overrides, "--nproc", "2"]
    command = [sys.executable, "-P", "-m", "launch.cli", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=dict(os.environ))
    return weights(run_dir)


def warn_of_time_limit(job: TrainingJob) -> None:
    """What `#SBATCH --signal=B:USR1@...` does, now."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", str(job.id)], check=True)


def wait_for_start(job: TrainingJob, number: int, steps: int) -> None:
    """Wait until start `number` (from 0) has done `steps` steps."""
    job.wait_for(lambda: len(job.attempts) > number, 120)
    job.wait_for(lambda: job.step_of(number) >= job.attempts[number]["step"] + steps, 150)


def test_two_ranks_a_node(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, "train.steps=4", ranks=2)
    job.finish()
    assert (job.saved, job.ends) == (4, [("finished", 0)])
    assert "step 4/4" in job.output
    folder = job.run_dir / f"logs/{job.id}.0"
    assert {f"rank-{rank:05d}.log" for rank in range(4)} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("launcher", ["agent", "srun"])
def test_deaths_and_time_limits_do_not_change_a_bit(slurm, tmp_path, tiny_shards, launcher):
    """A rank is killed, what started it is killed, the time limit comes: four starts, the weights of one."""
    length = ("train.steps=60", "checkpoint.every=10", "checkpoint.async=false")
    job = start_job(slurm, tmp_path / "run", tiny_shards, *length, launcher=launcher)
    wait_for_start(job, 0, 12)
    job.ranks("n2")[-1].kill()
    wait_for_start(job, 1, 3)
    assert job.attempts[1]["step"] >= 10
    job.processes("n1", "launch.agent")[-1].kill()
    wait_for_start(job, 2, 3)
    warn_of_time_limit(job)
    job.finish(timeout=200)
    assert slurm.job(job.id)["Restarts"] == "1"
    assert [end for end in job.ends if end[0] not in ("error", "signal")] == [
        ("rank lost", 0), ("rank lost", 1), ("time limit", 2), ("finished", 3)
    ]  # fmt: skip
    assert job.attempts[3]["step"] % 10 or job.attempts[3]["step"] >= job.attempts[2]["step"] + 3  # saved when told
    assert "rank lost of rank 1 on n2: rank 1 of 2 died (signal 9)" in job.output
    assert weights(job.run_dir) == uninterrupted(tmp_path / "other", tiny_shards, *length)


def test_lost_nodes_are_replaced_and_then_done_without(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, *ENDLESS, launcher="srun", spares=1)
    wait_for_start(job, 0, 12)
    assert job.attempts[0]["nodes"] == ["n1", "n2"]
    slurm.kill_node("n2")
    wait_for_start(job, 1, 3)
    assert job.attempts[1]["nodes"] == ["n1", "n3"]
    slurm.kill_node("n3")
    wait_for_start(job, 2, 3)
    assert job.attempts[2]["nodes"] == ["n1"]  # the same global batch
    steps = [attempt["step"] for attempt in job.attempts]
    assert 10 <= steps[1] <= steps[2]
    subprocess.run(["scancel", "--signal=TERM", str(job.id)], check=True)  # to the ranks, not the supervisor
    job.finish()
    assert job.saved == job.step
    assert [end for end in job.ends if end[0] not in ("error", "signal")] == [
        ("node lost", 0), ("node lost", 1), ("preempted or cancelled", 2)
    ]  # fmt: skip


def test_a_job_that_outlives_its_supervisors_node_is_queued_again(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, *ENDLESS, launcher="srun")
    wait_for_start(job, 0, 12)
    slurm.kill_node("n1")
    wait_for_start(job, 1, 3)
    assert job.attempts[1]["nodes"] == ["n2", "n3"] and job.attempts[1]["step"] >= 10
    assert job.ends[-1] == ("node lost", 0)
    said = [path.read_text() for path in (job.run_dir / "logs").glob(f"guard-{job.id}-*.log")]
    assert "node n1, where the supervisor ran, is lost" in "".join(said)


def test_a_lost_node_without_spares_requeues_the_job(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, *ENDLESS, "parallel.dp_shard=2", launcher="srun")
    wait_for_start(job, 0, 12)
    slurm.kill_node("n1")  # with the supervisor
    wait_for_start(job, 1, 3)
    assert job.attempts[1]["nodes"] == ["n2", "n3"]
    assert job.ends[-1] == ("node lost", 0)
    subprocess.run(["scancel", str(job.id)], check=True)
    job.finish(state="CANCELLED")
    job.wait_for(lambda: job.ends[-1] == ("preempted or cancelled", 1), 20)
    assert job.saved == job.step


def test_a_sick_node_is_left_out_and_then_excluded(slurm, tmp_path, tiny_shards):
    """With a spare the job goes on beside it; without one it is queued again for other nodes."""
    python = tmp_path / "python"
    python.write_text(SLOW_N1)
    python.chmod(0o755)
    fixed = ("train.steps=3", "parallel.dp_shard=2")
    check = {"launcher": "srun", "health": "exclude", "python": python}
    spared = start_job(slurm, tmp_path / "spared", tiny_shards, *fixed, spares=1, **check)
    spared.finish(timeout=200)
    assert [attempt["nodes"] for attempt in spared.attempts] == [["n2", "n3"]]
    assert "rank 0 on n1 is slow" in spared.output and "left out: n1" in spared.output
    slurm.wait_idle()
    job = start_job(slurm, tmp_path / "run", tiny_shards, *fixed, **check)
    job.finish(timeout=300)
    assert [attempt["nodes"] for attempt in job.attempts] == [["n2", "n3"]]
    assert job.ends == [("unhealthy", 0), ("finished", 1)]
    assert slurm.job(job.id)["ExcNodeList"] == "n1"


def test_a_mistake_ends_the_job_and_is_said_last(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, "train.steps=50", "optim.lr=1e30", launcher="srun")
    job.finish(state="FAILED")
    assert slurm.job(job.id)["ExitCode"] == "2:0"
    assert len(job.attempts) == 1
    assert [end[0] for end in job.ends] == ["error"]
    last = job.output.splitlines()[-1]
    assert last.startswith("pretrain: error of rank") and "resume there with a lower optim.lr" in last
    assert f"logs/{job.id}.0/rank-0000" in last


def test_no_checkpoint_in_two_starts_is_the_end(slurm, tmp_path, tiny_shards):
    never = ("train.steps=100000", "checkpoint.every=100000")
    job = start_job(slurm, tmp_path / "run", tiny_shards, *never, launcher="srun")
    for number in range(2):
        wait_for_start(job, number, 1)
        job.ranks("n1")[-1].kill()
    job.finish(state="FAILED")
    assert "no new checkpoint in two starts in a row" in job.output


def test_fewer_nodes_keep_the_global_batch(tmp_path):
    def fitting(nodes: int, **parallel: int) -> int:
        degrees = "\n".join(f"{key} = {value}" for key, value in parallel.items())
        text = f"[train]\nsteps = 9\nglobal_batch = 16\nmicro_batch = 2\n[parallel]\n{degrees}\n"
        (tmp_path / "submitted.toml").write_text(text)
        return fewer_nodes(tmp_path, nodes, ranks_per_node=2)

    assert fitting(4, dp_shard=-1) == 4
    assert fitting(3, dp_shard=-1) == 2  # 6 processes do not divide 8 micro-batches
    assert fitting(3, dp_shard=-1, tp=4) == 2
    assert fitting(1, dp_shard=-1, tp=4) == 0
    assert fitting(3, dp_shard=4) == 0
    assert goal(tmp_path) == 9


def test_a_preempted_job_saves_and_comes_back(slurm, tmp_path, tiny_shards):
    job = start_job(slurm, tmp_path / "run", tiny_shards, *ENDLESS, "checkpoint.every=100000", launcher="srun")
    wait_for_start(job, 0, 3)
    slurm.submit("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 3")
    wait_for_start(job, 1, 2)
    assert job.attempts[1]["step"] >= 3  # saved when told; nothing was due
    assert ("preempted or cancelled", 0) in job.ends


def test_slurm_itself_tells_of_the_time_limit(slurm, tmp_path, tiny_shards):
    never = (*ENDLESS, "checkpoint.every=100000")
    job = start_job(slurm, tmp_path / "run", tiny_shards, *never, time="1", grace=25)
    job.wait_for(lambda: len(job.attempts) > 1, 150)
    assert ("time limit", 0) in job.ends
    wait_for_start(job, 1, 3)
    assert job.attempts[1]["step"] > 0  # nothing was due: saved when told
    subprocess.run(["scancel", "--signal=TERM", str(job.id)], check=True)
    job.finish()
    alone = uninterrupted(tmp_path / "other", tiny_shards, *never, f"train.stop_at={job.saved}")
    assert weights(job.run_dir) == alone


def test_a_rank_that_stands_still_is_named_and_the_run_starts_anew(slurm, tmp_path, tiny_shards, capsys):
    job = start_job(slurm, tmp_path / "run", tiny_shards, *ENDLESS, "watchdog.stall_s=8", launcher="srun")
    wait_for_start(job, 0, 12)
    job.ranks("n2")[-1].suspend()
    wait_for_start(job, 1, 3)
    (end,) = (end for end in read_ends(job.run_dir) if end["reason"] == "stalled")
    assert end["restart"] == 0 and "rank 1 has not come to " in end["detail"]
    assert job.attempts[1]["step"] >= 10
    assert main(["status", str(job.run_dir)]) == 0
    assert "rank 1 has not come to " in capsys.readouterr().out
    subprocess.run(["scancel", str(job.id)], check=True)
    job.finish(state="CANCELLED")

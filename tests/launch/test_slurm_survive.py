"""Jobs on a real cluster that lose ranks, nodes and time, and train to the end."""

import os
import signal
import subprocess

import pytest

from launch.rundir import read_json
from tests.launch.jobs import start_job, weights

pytestmark = pytest.mark.slow
LONG = ["train.steps=400", "checkpoint.every=20", "checkpoint.async=false"]


@pytest.fixture(autouse=True)
def quick_ranks(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the nodes are on one machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("launcher", ["agent", "srun"])
def test_two_nodes_train_and_finish(slurm, tmp_path, tiny_shards, launcher):
    job = start_job(slurm, tmp_path / "run", tiny_shards, "train.steps=4", launcher=launcher)
    job.finish()
    assert job.saved == 4
    assert job.ends == [("finished", 0)]
    assert "step 4/4" in job.output
    folder = job.run_dir / f"logs/{job.id}.0"
    assert {f"rank-{rank:05d}.log" for rank in range(4)} <= {path.name for path in folder.iterdir()}

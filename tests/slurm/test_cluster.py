"""The cluster that other tests run on."""

import pytest

from tests.slurm.cluster import Cluster, wait_until


def test_jobs_run_on_several_nodes(slurm: Cluster) -> None:
    job = slurm.submit("--nodes=2", "--ntasks-per-node=2", "--wrap=srun sh -c 'echo $SLURMD_NODENAME $SLURM_PROCID'")
    assert slurm.wait(job) == "COMPLETED"
    assert sorted(slurm.output(job).split("\n")[:4]) == ["n1 0", "n1 1", "n2 2", "n2 3"]


@pytest.mark.slow
def test_jobs_survive_a_lost_node_and_the_node_comes_back(slurm: Cluster) -> None:
    job = slurm.submit("--nodes=2", "--requeue", "--wrap=srun sleep 600")
    slurm.wait(job, "RUNNING")
    wait_until(lambda: any("sleep" in process.name() for process in slurm.processes("n2")), 10)
    slurm.kill_node("n2")
    assert not slurm.processes("n2")
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", 30, lambda: slurm.report(job))
    wait_until(lambda: slurm.node_states()["n2"].startswith("down"), 30, slurm.report)
    slurm.wait(job, "RUNNING", timeout=30)  # n3 takes its place
    assert slurm.job(job)["NodeList"] == "n[1,3]"
    slurm.start_node("n2")
    wait_until(lambda: slurm.node_states()["n2"] == "idle", 30, slurm.report)

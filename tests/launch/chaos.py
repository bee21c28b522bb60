"""A job on a real cluster that meets random faults, and must train to the same bits.

python -m tests.launch.chaos [--faults 20] [--seed 1]
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretrain.data import build_tiny_shards
from tests.launch.jobs import TrainingJob, small_job, start_job, weights
from tests.slurm.cluster import Cluster, running

STEPS_A_FAULT = 25
FAULTS = ("rank killed", "rank crashes", "agent killed", "step daemon killed", "time limit", "node lost")
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def survive(cluster: Cluster, folder: Path, shards: Path, faults: int, seed: int) -> list[str]:
    """Trains with so many faults on 2 nodes, and once without any; returns what was done to it, a line each."""
    choose = random.Random(seed)
    steps = STEPS_A_FAULT * (faults + 1)
    length = (f"train.steps={steps}", "checkpoint.every=5", "checkpoint.async=false")
    launcher = choose.choice(("agent", "srun"))
    job = start_job(cluster, folder / "run", shards, *length, launcher=launcher, max_requeues=2 * faults)
    told = []
    early = False
    number = -1  # of the start that was harmed last
    for _ in range(faults):
        job.wait_for(lambda harmed=number: len(job.attempts) > harmed + 1, 150)
        number = len(job.attempts) - 1
        # Now and then while the ranks start, never twice in a row: two starts without a checkpoint end a job.
        early = not early and bool(told) and choose.random() < 0.25
        if early:
            time.sleep(choose.uniform(0.5, 6))
        else:
            more = choose.randint(6, 14)
            job.wait_for(lambda steps=more: job.step_of(-1) >= job.attempts[-1]["step"] + steps, 150)
            number = len(job.attempts) - 1  # a start may have failed on its own, as for a port that is taken
        fault = choose.choice(FAULTS)
        told.append(f"{fault} at step {job.step_of(-1)}{' (starting)' if early else ''}")
        print(told[-1], flush=True)
        harm(job, fault, choose)
    job.finish(timeout=60 + steps)
    assert job.saved == steps
    assert len(job.attempts) > faults
    arguments = ["run", "tiny", *small_job(folder / "other", shards), *length, "--nproc", "2"]
    command = [sys.executable, "-P", "-m", "launch.cli", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=120 + steps, env={**os.environ, **QUIET})
    assert weights(job.run_dir) == weights(folder / "other")
    return told


def harm(job: TrainingJob, fault: str, choose: random.Random) -> None:
    """Do it, on one of the nodes that train now."""
    node, before = choose.choice(job.attempts[-1]["nodes"]), len(job.attempts)
    if fault == "node lost":
        job.cluster.kill_node(node)
        job.wait_for(lambda: len(job.attempts) > before, 150)
        job.cluster.start_node(node)
    elif fault == "time limit":
        subprocess.run(["scancel", "--batch", "--signal=USR1", str(job.id)], check=True)
    elif fault == "step daemon killed":
        # The one of the training step, not of the batch script.
        job.wait_for(lambda: job.processes(node, "launch.agent"), 60)
        job.processes(node, "launch.agent")[-1].parent().kill()
    elif fault == "agent killed":
        job.wait_for(lambda: job.processes(node, "launch.agent"), 60)
        job.processes(node, "launch.agent")[-1].kill()
    else:
        job.wait_for(lambda: job.ranks(node), 60)
        job.ranks(node)[-1].send_signal(signal.SIGKILL if fault == "rank killed" else signal.SIGSEGV)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ.update(QUIET)
    clusters = running()
    cluster = next(clusters)
    try:
        with tempfile.TemporaryDirectory() as name:
            build_tiny_shards(Path(name) / "shards")
            begin = time.monotonic()
            told = survive(cluster, Path(name), Path(name) / "shards", args.faults, args.seed)
            print(f"{len(told)} faults in {time.monotonic() - begin:.0f} s, the same weights to the bit")
    finally:
        for _ in clusters:
            pass


if __name__ == "__main__":
    main()

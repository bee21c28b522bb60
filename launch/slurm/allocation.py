"""The nodes of the job that this process runs in, and steps on them. SLURM's commands, without a shell."""

import os
import subprocess
from collections.abc import Sequence

SECONDS = 20  # for an answer of SLURM's
PROBE_SECONDS = 10  # for a node to run nothing at all


def call(*command: str, seconds: float = SECONDS) -> str:
    """What a command prints; empty where it fails or gives no answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def own_id() -> str:
    """What SLURM's commands call this job alone: of an array, one job has the number of the whole."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]


def allocated() -> list[str]:
    """The nodes that the job has now, in SLURM's order: one that was lost is no longer there."""
    now = call("squeue", "-h", "-j", own_id(), "-o", "%N") or os.environ["SLURM_JOB_NODELIST"]
    return call("scontrol", "show", "hostnames", now).split()


def address(node: str) -> str:
    """Where other nodes reach it."""
    words = call("scontrol", "show", "node", node, "--oneliner").split()
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), node)


def answering(nodes: Sequence[str]) -> list[str]:
    """Those of them that run a command now: SLURM itself may take minutes to see that a node is gone."""
    options = ["--nodes=1", "--ntasks=1", "--overlap", "--mpi=none", "--input=none"]
    probes = [
        subprocess.Popen(
            ["srun", *options, f"--nodelist={node}", "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in nodes
    ]
    found = []
    for node, probe in zip(nodes, probes, strict=True):
        try:
            if probe.wait(PROBE_SECONDS) == 0:
                found.append(node)
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
    return found


def signal_ranks(name: str) -> None:
    """Send a signal to all steps; the batch script, where the supervisor is, gets none."""
    call("scancel", f"--signal={name}", own_id())


def end_steps() -> None:
    """End all steps, also those that wait for a node that is gone."""
    steps = call("squeue", "--steps", "-h", "-j", own_id(), "-o", "%i").split()
    numbered = [step for step in steps if step.rpartition(".")[2].isdecimal()]
    if numbered:
        call("scancel", *numbered)


def state() -> dict[str, str]:
    """The job's fields as SLURM shows them, such as JobState and PreemptTime."""
    words = call("scontrol", "show", "job", "--oneliner", own_id()).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def requeue() -> bool:
    """Have SLURM end this job and queue it again; whether it takes that: a busy controller may not answer in time."""
    return _change("requeue", own_id())


def exclude(nodes: Sequence[str]) -> bool:
    """Have the job, queued again, never start on these nodes, nor on those that it excluded before."""
    before = state().get("ExcNodeList", "(null)")
    names = ",".join([*([] if before == "(null)" else [before]), *nodes])
    return _change("update", f"JobId={own_id()}", f"ExcNodeList={names}")


def _change(*words: str) -> bool:
    """Whether scontrol does it; what it says of mistakes stands in the job's output."""
    try:
        return subprocess.run(["scontrol", *words], timeout=SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False

"""Queues a job again that has lost the node of its supervisor.

    python -P -m launch.slurm.guard NODE          (a task on another node; NODE: the supervisor's)

A job with --no-kill outlives each of its nodes, also the one where its batch script ran: nothing would train in it any
more until its time ends. Imports no torch.
"""

import subprocess
import sys
import time
from pathlib import Path

from launch.slurm import allocation

LOOK_SECONDS = 10.0  # SLURM takes minutes to give a node up


def main(node: str) -> int:
    """Returns once the job is queued again; ends with the job before that."""
    while True:
        if lost(node):
            print(f"node {node}, where the supervisor ran, is lost: back into the queue", flush=True)
            if allocation.requeue():
                return 0
        time.sleep(LOOK_SECONDS)


def lost(node: str) -> bool:
    """Whether the job goes on without the node; one that is ending gives its nodes back one by one."""
    fields = allocation.state()
    names = allocation.call("scontrol", "show", "hostnames", fields.get("NodeList", "")).split()
    return fields.get("JobState") == "RUNNING" and bool(names) and node not in names


def start(node: str, watched: str, folder: Path) -> subprocess.Popen[bytes]:
    """Have `node` look after node `watched`; what it says goes to `folder`."""
    # Of a name with a pattern the file is written there, not through this node.
    log = str(folder).replace("%", "%%") + "/guard-%j-%N.log"
    options = ["--nodes=1", "--ntasks=1", "--overlap", "--mpi=none", "--open-mode=append", f"--nodelist={node}"]
    command = ["srun", *options, f"--output={log}", f"--error={log}", sys.executable, "-P", "-m", "launch.slurm.guard"]
    none = subprocess.DEVNULL
    return subprocess.Popen([*command, watched], stdin=none, stdout=none, stderr=none)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

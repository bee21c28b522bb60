"""One task of a job's step: the ranks of a node (launcher "agent"), or one rank of several (launcher "srun").

    python -P -m launch.agent RUN_DIR

The supervisor (`launch.slurm.job`) starts it with MASTER_ADDR and MASTER_PORT; SLURM numbers the tasks. What is wrong
with a rank here goes to RUN_DIR/logs/<job>.<restart>/failed-<rank>.json.
"""

import importlib
import os
import sys
from pathlib import Path

from launch.local import count_gpus, rank_environment
from launch.ranks import Ranks
from launch.rundir import read_json
from pretrain.history import this_start


def main(run_dir: Path) -> int:
    """Run this task's ranks to their end; returns their exit code. Restarts are the supervisor's."""
    job = read_json(run_dir / "job.json")
    task, tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    alone = job["launcher"] == "srun"
    here = 1 if alone else job["ranks_per_node"]
    port = int(os.environ["MASTER_PORT"])
    start = this_start()
    ranks = Ranks(
        command=[sys.executable, "-P", "-m", "launch.cli", "run", str(run_dir / "submitted.toml")],
        environment=rank_environment(job["ranks_per_node"], count_gpus()),
        first=task * here,
        here=here,
        world=tasks * here,
        address=os.environ["MASTER_ADDR"],
        port=port,
        run_dir=run_dir,
        job=start["job"],
        restart=start["restart"],
        echo=False,  # the supervisor does
        parent=os.getppid(),
        local=int(os.environ["SLURM_LOCALID"]) if alone else 0,
        per_node=job["ranks_per_node"],
    )
    ranks.handle_signals()
    ranks.start()
    if alone:
        code = ranks.wait()
    else:
        # torch is imported (2 s) while the ranks do the same.
        supervise = importlib.import_module("launch.elastic").supervise
        code = supervise(ranks, group=task, groups=tasks, port=port + 1, restarts=0)
    ranks.tell()
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

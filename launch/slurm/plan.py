"""One job as it will be submitted: who runs what, where, on how much."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm.cluster import ClusterConfig


@dataclass(frozen=True)
class JobPlan:
    """run_dir: absolute; of a sweep, the folder around those of its points. folder: where relative paths of the recipe
    start. nodes: those that train; spares: nodes beside them, for when one is sick. time_limit: seconds, None for no
    limit. indices: the points of a sweep that are to run, at most at_once of them at a time (0: all). environment:
    names of variables that the job gets. code: folder of the package that it runs; None: where Python finds it.
    cluster: the site's defaults with the options of the command line.
    """

    name: str
    run_dir: Path
    folder: Path
    recipe: str
    overrides: list[str]
    nodes: int
    ranks_per_node: int
    spares: int
    time_limit: int | None
    max_requeues: int
    chain: int
    cluster: ClusterConfig
    python: str
    environment: list[str]
    mounts: list[str]
    indices: list[int] | None = None
    at_once: int = 0
    code: Path | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


def srun_options(plan: JobPlan) -> list[str]:
    """What `srun` needs to start a rank or an agent: a container's image, where Pyxis runs it."""
    container = plan.cluster.container
    if container.kind != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(f'{path}:{path}' for path in plan.mounts)}"] if plan.mounts else []
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={plan.folder}"]


def rank_python(plan: JobPlan) -> list[str]:
    """The command that is Python for ranks and agents."""
    container = plan.cluster.container
    if container.kind == "none":
        return [plan.python]
    if container.kind == "pyxis":
        return [container.python]
    gpus = ["--nv"] if plan.cluster.gpus_per_node else []
    binds = [word for path in plan.mounts for word in ("--bind", f"{path}:{path}")]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(plan.folder), container.image, container.python]


def describe_job(plan: JobPlan, submitted: str, command: list[str], job_ids: list[str]) -> dict[str, Any]:
    """What stands in job.json. srun_options and rank_python: how a step starts Python on the nodes."""
    cluster = plan.cluster
    return {
        "name": plan.name,
        "submitted": submitted,
        "command": command,
        "recipe": plan.recipe,
        "overrides": plan.overrides,
        "nodes": plan.nodes,
        "ranks_per_node": plan.ranks_per_node,
        "gpus_per_node": cluster.gpus_per_node,
        "spares": plan.spares,
        "launcher": cluster.launcher,
        "partition": cluster.partition,
        "time_limit_s": plan.time_limit,
        "grace_s": cluster.grace,
        "max_requeues": plan.max_requeues,
        "health": cluster.health,
        "chain": plan.chain,
        "container": cluster.container.model_dump(mode="json"),
        "srun_options": srun_options(plan),
        "rank_python": rank_python(plan),
        "job_ids": job_ids,
        "array": None,
        "cluster": cluster.model_dump(mode="json"),
    }

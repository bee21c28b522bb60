"""Everything that can be wrong with a job, found before it waits in a queue."""

import re
from collections.abc import Iterable
from pathlib import Path

from checkpoints.store import CheckpointStore
from data_pipeline.places import find_shards
from data_pipeline.remote import is_remote
from launch.rundir import read_json
from launch.slurm.cluster import plain_path
from launch.slurm.plan import JobPlan
from launch.slurm.queue import Node, Partition, alive_jobs, all_here, format_time
from pretrain.config import RunConfig
from pretrain.data import with_tokenizer
from pretrain.resume import check_resume
from pretrain.verify import check_degrees

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs")  # of one machine, for certain
ON_DISK = ("ext2", "ext3", "ext4", "xfs", "btrfs")  # of one machine, unless it exports them


def check_run(config: RunConfig, processes: int) -> bool:
    """Whether there is something left to do for the recipe; raises what the ranks would raise as they start."""
    check_degrees(config, processes)
    with_tokenizer(config)
    checkpoints = Path(config.run.dir) / "checkpoints"
    if not checkpoints.is_dir() and config.run.resume != "must":
        return True
    store = CheckpointStore(checkpoints)
    found = store.newest_whole()
    check_resume(config, store, found)
    return found is None or found < (config.train.stop_at or config.train.steps)


def find_data(configs: Iterable[RunConfig]) -> list[Path]:
    """Folders of all local shards that runs read. Raises FileNotFoundError for patterns without a file."""
    patterns = {source.shards for config in configs for source in config.data.sources}
    patterns |= {config.eval.shards for config in configs if config.eval.every}
    folders: dict[Path, None] = {}
    for pattern in sorted(patterns):
        if not is_remote(pattern.removeprefix("file://")):
            folders |= {shard.path.parent.resolve(): None for shard in find_shards(pattern)}
    return [plain_path(folder) for folder in folders]


def check_alone(run_dir: Path) -> list[str]:
    """Ids of earlier jobs of the run. Raises ValueError while one of them is alive."""
    job_ids = [str(job) for job in (read_json(run_dir / "job.json") or {}).get("job_ids", [])]
    alive = alive_jobs(job_ids)
    if alive:
        states = ", ".join(f"{job} ({state.lower()})" for job, state in alive.items())
        raise ValueError(f"{run_dir} has a job already: {states}; wait, cancel it, or choose another run.dir")
    return job_ids


def check_partition(plan: JobPlan, partition: Partition) -> list[str]:
    """Warnings. Raises ValueError for what the partition can never give."""
    name, cluster, wanted = partition.name, plan.cluster, plan.nodes + plan.spares
    if not partition.up:
        raise ValueError(f"partition {name} is not up; choose another with --partition")
    if partition.max_nodes is not None and wanted > partition.max_nodes:
        raise ValueError(f"--nodes {wanted}: a job in partition {name} has at most {partition.max_nodes} nodes")
    limit = partition.max_time
    if plan.time_limit is not None and limit is not None and plan.time_limit > limit:
        raise ValueError(
            f"--time {format_time(plan.time_limit)}: a job in partition {name} has at most {format_time(limit)}; "
            "ask for less, and let the job requeue itself or use --chain"
        )
    if plan.time_limit is not None and cluster.grace >= plan.time_limit:
        raise ValueError(
            f"--grace {cluster.grace}: is not less than the time limit of {plan.time_limit} seconds; lower it"
        )
    fitting = _fitting(plan, partition)
    usable = sum(node.usable for node in fitting)
    if usable < wanted:
        return [f"of the nodes of partition {name} that fit, {usable} can be used now: the job waits for {wanted}"]
    return []


def check_shared(paths: Iterable[Path], nodes: int, partition: Partition) -> list[str]:
    """Warnings for folders that other machines may not see. Raises ValueError for those that they cannot see."""
    if nodes == 1 or all_here(partition):
        return []
    warnings = []
    for path in paths:
        kind = file_system(path)
        if kind in IN_MEMORY:
            raise ValueError(f"{path} is on a {kind} of this machine, which no node sees; move it to a shared disk")
        if kind in ON_DISK:
            warnings.append(f"{path} is on a disk of this machine ({kind}); all nodes must see it under this path")
    return warnings


def file_system(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that a path is on, or will be; empty where the system does not tell."""
    table = Path("/proc/mounts")
    if mounts is None:
        mounts = table.read_text() if table.is_file() else ""
    best, kind = -1, ""
    resolved = path.resolve()
    for line in mounts.splitlines():
        place, found = line.split()[1:3]
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place)
        if resolved.is_relative_to(place) and len(place) >= best:
            best, kind = len(place), found
    return kind


def _fitting(plan: JobPlan, partition: Partition) -> list[Node]:
    """Nodes that have what the job wants of each. Raises ValueError where they are too few."""
    cluster, wanted, nodes = plan.cluster, plan.nodes + plan.spares, list(partition.nodes)
    gpus, cpus = cluster.gpus_per_node, cluster.cpus_per_rank * plan.ranks_per_node
    _enough(nodes, wanted, f"partition {partition.name} has {{}}")
    if re.fullmatch(r"\w+", cluster.constraint):  # others are SLURM's to judge
        nodes = [node for node in nodes if cluster.constraint in node.features]
        _enough(nodes, wanted, f"partition {partition.name} has {{}} with --constraint {cluster.constraint}")
    if gpus:
        kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
        if cluster.gpu_type and cluster.gpu_type not in kinds:
            has = ", ".join(kinds) or "no kinds of GPUs"
            raise ValueError(f"gpu_type = {cluster.gpu_type!r}: partition {partition.name} has {has}; change it")
        most = max((node.count_gpus(cluster.gpu_type) for node in nodes), default=0)
        nodes = [node for node in nodes if node.count_gpus(cluster.gpu_type) >= gpus]
        if not nodes:
            raise ValueError(
                f"--gpus-per-node {gpus}: nodes of partition {partition.name} have at most {most} GPUs; lower it, or "
                "choose another --partition"
            )
        _enough(nodes, wanted, f"partition {partition.name} has {{}} with {gpus} GPUs or more")
    if cpus:
        nodes = [node for node in nodes if node.cpus >= cpus]
        _enough(nodes, wanted, f"partition {partition.name} has {{}} with {cpus} CPUs or more (--cpus-per-rank)")
    return nodes


def _enough(nodes: list[Node], wanted: int, has: str) -> None:
    if len(nodes) < wanted:
        count = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
        raise ValueError(f"{wanted} nodes (--nodes and --spares): {has.format(count)}; lower it, or choose another")

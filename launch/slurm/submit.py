"""From a recipe to a job in SLURM's queue."""

import fcntl
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from launch.rundir import read_json, write_json
from launch.slurm.checks import check_alone, check_partition, check_run, check_shared, find_data
from launch.slurm.cluster import NAME, ClusterConfig, forwarded, plain_path
from launch.slurm.plan import JobPlan, describe_job
from launch.slurm.queue import NoAnswer, call, find_partition, max_array_size, parse_time
from launch.slurm.script import TEMPLATE, render
from launch.slurm.snapshot import CODE, copy_code, write_snapshot
from launch.slurm.sweep import Point, describe_sweep, points_of
from parallel.engine import check_installed
from pretrain.config import RunConfig, resolve, write_config

MAX_REQUEUES = 10
# What libraries of clusters are steered by: a job that lacks them is slow, or does not find its network.
STEERING = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "HF_", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Order:
    """What a user asks for; `cluster`: the site's defaults with the options of the command line."""

    recipe: str
    overrides: list[str]
    nodes: int
    cluster: ClusterConfig
    name: str = ""
    spares: int = 0
    chain: int = 1
    max_requeues: int | None = None
    sweep: tuple[str, ...] = ()
    at_once: int = 0
    environment: tuple[str, ...] = ()
    template: str = ""
    dry_run: bool = False
    copy_code: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """An order that has been checked. configs: of the run, or of each point of the sweep that is left to do."""

    plan: JobPlan
    script: str
    points: list[Point]
    configs: dict[Path, RunConfig]
    earlier: list[str]
    warnings: list[str]


def prepare(order: Order) -> Job:
    """Check everything that can be checked before the queue; writes nothing. Raises ValueError or FileNotFoundError."""
    for option, value, least in (
        ("--nodes", order.nodes, 1),
        ("--spares", order.spares, 0),
        ("--chain", order.chain, 1),
        ("--at-once", order.at_once, 0),
        ("--max-requeues", order.max_requeues or 0, 0),
    ):
        if value < least:
            raise ValueError(f"{option} {value}: must be at least {least}")
    if order.name and not NAME.fullmatch(order.name):
        raise ValueError(f"--name {order.name!r}: letters, digits and _.@+- are allowed")
    config, _ = resolve(order.recipe, order.overrides)
    run_dir = plain_path(Path(config.run.dir).absolute())
    if order.copy_code and os.pathsep in str(run_dir):
        raise ValueError(f"--copy-code: Python finds no code in {run_dir}, as it has a {os.pathsep}; rename it")
    cluster, ranks = _per_node(order.cluster)
    points = points_of(list(order.sweep), run_dir) if order.sweep else []
    configs = _configs(order, config, points, run_dir, order.nodes * ranks)
    data = find_data(configs.values()) + _other_files(configs.values())
    plan = JobPlan(
        name=order.name or _job_name(run_dir),
        run_dir=run_dir,
        folder=plain_path(Path.cwd()),
        recipe=order.recipe,
        overrides=order.overrides,
        nodes=order.nodes,
        ranks_per_node=ranks,
        spares=order.spares,
        time_limit=parse_time(cluster.time) if cluster.time else None,
        max_requeues=order.max_requeues if order.max_requeues is not None else MAX_REQUEUES if order.chain == 1 else 0,
        chain=order.chain,
        cluster=cluster,
        python=cluster.python or (f"{cluster.venv}/bin/python" if cluster.venv else sys.executable),
        environment=forwarded(cluster, list(order.environment)),
        mounts=_mounts(cluster, run_dir, data),
        indices=[point.index for point in points if point.run_dir in configs] if points else None,
        at_once=order.at_once,
        code=run_dir / "snapshot" / CODE if order.copy_code else None,
    )
    _check_sweep(run_dir, points)
    if plan.python == sys.executable and cluster.container.kind == "none":
        check_installed(config.engine)  # jobs will find what is here
    try:
        earlier = check_alone(run_dir)
        plan, warnings = _ask_cluster(plan, [run_dir, *data])
    except NoAnswer as error:
        if not order.dry_run:
            raise
        earlier, warnings = [], [f"whether the cluster has what this job wants is not known: {error}"]
    left = [name for name in sorted(os.environ) if name.startswith(STEERING) and name not in plan.environment]
    if left:
        warnings.append(f"{', '.join(left)}: set here, but not in the job; forward with --env or the cluster file")
    template = Path(order.template) if order.template else TEMPLATE
    return Job(plan, render(plan, template), points, configs, earlier, warnings)


def submit(job: Job, order: Order) -> list[str]:
    """Write the run's folder and queue the job, `chain` times; returns the ids."""
    plan = job.plan
    with _locked(plan.run_dir):
        earlier = check_alone(plan.run_dir)  # another one may have been quicker
        folders = list(job.configs)
        for folder, config in job.configs.items():
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            write_config(_restartable(config), folder / "submitted.toml")
        if job.points:
            write_json(plan.run_dir / "sweep.json", describe_sweep(job.points))
        print(write_snapshot(plan.run_dir / "snapshot"))
        if plan.code is not None:
            copy_code(plan.run_dir / "snapshot")
        script = plan.run_dir / "job.sh"
        script.write_text(job.script, encoding="utf-8")
        submitted = datetime.now(UTC).isoformat(timespec="seconds")
        old = {folder: (read_json(folder / "job.json") or {}).get("job_ids", []) for folder in folders}

        def describe(queued: list[str]) -> None:
            record = describe_job(plan, submitted, list(order.command), [*earlier, *queued])
            for point in job.points:
                if point.run_dir in job.configs:
                    own = {"overrides": [*plan.overrides, *point.overrides], "array": {"index": point.index}}
                    ids = [*old[point.run_dir], *(f"{job_id}_{point.index}" for job_id in queued)]
                    write_json(point.run_dir / "job.json", record | own | {"job_ids": ids})
            array = {"points": len(job.points), "at_once": plan.at_once} if job.points else None
            write_json(plan.run_dir / "job.json", record | {"array": array})

        describe([])  # before a job can start and look for it
        queued: list[str] = []
        try:
            for _ in range(plan.chain):
                queued.append(_queue(script, queued))
        finally:
            if queued:
                describe(queued)
    return queued


def _configs(
    order: Order, config: RunConfig, points: list[Point], run_dir: Path, processes: int
) -> dict[Path, RunConfig]:
    """Folder -> config of each run that has steps left; each is checked."""
    if not points:
        if not check_run(config, processes):
            raise ValueError(f"{run_dir} has taken all its steps already; raise train.steps, or choose another run.dir")
        return {run_dir: config}
    configs = {}
    for point in points:
        at = [f"run.dir={Path(config.run.dir) / point.run_dir.name}"]
        if config.checkpoint.remote:
            at.append(f"checkpoint.remote={config.checkpoint.remote.rstrip('/')}/{point.run_dir.name}")
        try:
            own, _ = resolve(order.recipe, [*order.overrides, *point.overrides, *at])
            if check_run(own, processes):
                configs[point.run_dir] = own
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"--sweep, {' '.join(point.overrides)}: {error}") from None
    if not configs:
        raise ValueError(f"all runs of the sweep in {run_dir} have taken all their steps; choose another run.dir")
    return configs


def _restartable(config: RunConfig) -> RunConfig:
    """What the job's ranks read at each of its starts, of which the later ones continue the run."""
    if config.run.resume != "never":
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})


def _per_node(cluster: ClusterConfig) -> tuple[ClusterConfig, int]:
    ranks, gpus = cluster.ranks_per_node or cluster.gpus_per_node or 1, cluster.gpus_per_node
    if gpus and ranks > gpus:
        raise ValueError(f"--ranks-per-node {ranks}: is more than --gpus-per-node {gpus}; start one a GPU at most")
    container = cluster.container
    if container.kind != "none" and not container.image:
        raise ValueError(f"container.kind = {container.kind!r}, but container.image is not set; name an image")
    if container.image.startswith("/") and not Path(container.image).is_file():
        raise FileNotFoundError(f"container.image = {container.image!r}: no such file")
    python = cluster.python or (f"{cluster.venv}/bin/python" if cluster.venv else "")
    if python.startswith("/") and not os.access(python, os.X_OK):
        key = "python" if cluster.python else "venv"
        raise FileNotFoundError(f"{key} = {getattr(cluster, key)!r}: {python} is not there; give jobs a Python")
    return cluster, ranks


def _ask_cluster(plan: JobPlan, shared: list[Path]) -> tuple[JobPlan, list[str]]:
    partition = find_partition(plan.cluster.partition)
    limit = plan.time_limit
    if not plan.cluster.time:
        limit = partition.default_time or partition.max_time
    chosen = plan.cluster.model_copy(update={"partition": partition.name})
    plan = replace(plan, cluster=chosen, time_limit=limit)
    if plan.indices and plan.indices[-1] > max_array_size():
        raise ValueError(
            f"--sweep: {plan.indices[-1] + 1} runs; the cluster's arrays have at most {max_array_size() + 1}"
        )
    warnings = check_partition(plan, partition)
    return plan, warnings + check_shared(shared, plan.nodes + plan.spares, partition)


def _check_sweep(folder: Path, points: list[Point]) -> None:
    """A folder holds one run or one sweep, and a sweep keeps its points: their folders are known by number."""
    before = read_json(folder / "sweep.json")
    if points and (folder / "config.toml").is_file():
        raise ValueError(f"{folder} holds a run, not a sweep; choose another run.dir")
    if before is not None and not points:
        raise ValueError(f"{folder} holds a sweep; give its --sweep again, or choose another run.dir")
    if before is not None and before != describe_sweep(points):
        raise ValueError(f"{folder} holds a sweep over other values; choose another run.dir")


def _queue(script: Path, before: list[str]) -> str:
    """The id of the job, which waits for the last of `before` to end."""
    waits = [f"--dependency=afterany:{before[-1]}"] if before else []
    # What the shell of an allocation, or a user's habits, would say of another job.
    foreign = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    unset = [word for name in sorted(foreign) for word in ("-u", name)]
    return call("env", *unset, "sbatch", "--parsable", *waits, str(script)).strip().partition(";")[0]


def _other_files(configs: Iterable[RunConfig]) -> list[Path]:
    """Folders of what ranks read beside shards."""
    named = [Path(name).resolve() for config in configs for name in (config.tokenizer.path, config.data.skip) if name]
    return list(dict.fromkeys(plain_path(path if path.is_dir() else path.parent) for path in named))


def _mounts(cluster: ClusterConfig, run_dir: Path, data: list[Path]) -> list[str]:
    if cluster.container.kind == "none":
        return []
    paths = list(dict.fromkeys(map(str, [run_dir, Path.cwd(), *data, *cluster.container.mounts])))
    strange = next((path for path in paths if re.search(r"[:,]", path)), None)
    if strange:
        raise ValueError(f"path {strange!r}: containers cannot mount one with a colon or a comma; rename it")
    return paths


def _job_name(run_dir: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.@+-]+", "-", run_dir.name).lstrip(".@+-") or "pretrain"


def follow_up(run_dir: Path) -> list[str]:
    """Commands for what comes next."""
    quoted = shlex.quote(os.path.relpath(run_dir) if run_dir.is_relative_to(Path.cwd()) else str(run_dir))
    return [f"pretrain {verb} {quoted}{more}" for verb, more in (("status", ""), ("logs", " --follow"), ("cancel", ""))]


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / ".submit", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)

"""pretrain submit"""

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from launch.slurm.cluster import ClusterConfig, check_cluster, load_cluster
from launch.slurm.plan import describe_job
from launch.slurm.submit import Order, follow_up, prepare
from launch.slurm.submit import submit as queue

SITE = (
    *("partition", "account", "qos", "constraint", "time"),
    *("gpus_per_node", "ranks_per_node", "cpus_per_rank", "launcher", "grace", "health"),
)


def submit(args: argparse.Namespace) -> None:
    """Check a recipe and its layout, and queue it."""
    order = Order(
        recipe=args.recipe,
        overrides=args.overrides,
        nodes=args.nodes,
        cluster=with_options(load_cluster(args.cluster), args),
        name=args.name or "",
        spares=args.spares,
        chain=args.chain,
        max_requeues=args.max_requeues,
        sweep=tuple(args.sweep or ()),
        at_once=args.at_once,
        environment=tuple(args.env),
        template=args.template or "",
        dry_run=args.dry_run,
        copy_code=args.copy_code,
        command=("pretrain", *sys.argv[1:]),
    )
    job = prepare(order)
    for warning in job.warnings:
        print(f"pretrain: warning: {warning}", file=sys.stderr)
    if args.dry_run:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        print(job.script)
        print(json.dumps(describe_job(job.plan, now, list(order.command), job.earlier), indent=2))
        return
    queued = queue(job, order)
    plan = job.plan
    spares = f" + {plan.spares} spare" if plan.spares else ""
    runs = f" for each of {len(plan.indices)} runs" if plan.indices else ""
    print(
        f"job {', '.join(queued)} ({plan.name}) in partition {plan.cluster.partition}: {plan.nodes}{spares} nodes x "
        f"{plan.ranks_per_node} ranks{runs}"
    )
    print(f"run folder: {plan.run_dir}")
    for line in follow_up(plan.run_dir):
        print(f"  {line}")


def with_options(cluster: ClusterConfig, args: argparse.Namespace) -> ClusterConfig:
    """The site's defaults with what the command line says instead. Raises ValueError for values out of bounds."""
    given: dict[str, Any] = {key: value for key in SITE if (value := getattr(args, key)) is not None}
    if args.container:
        kind, separator, image = args.container.partition(":")
        if not separator or kind not in ("apptainer", "pyxis"):
            usual = cluster.container.kind if cluster.container.kind != "none" else "apptainer"
            kind, image = usual, args.container
        given["container"] = cluster.container.model_dump() | {"kind": kind, "image": image}
    if "gpus_per_node" in given and "ranks_per_node" not in given:
        given["ranks_per_node"] = 0  # the site's is for the site's GPUs
    return check_cluster(cluster.model_dump() | given, "pretrain submit")

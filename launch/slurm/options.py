"""The options of `pretrain submit`. Imports nothing: `--help` is quick."""

import argparse


def add_options(leaf: argparse.ArgumentParser) -> None:
    """Options without a default here have one in the site's file, or in `ClusterConfig`."""
    leaf.add_argument("recipe", help="a recipe's name, or the path of a .toml file")
    leaf.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as train.steps=200")
    leaf.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that train (default: 1)")
    leaf.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of a node, one rank each; 0: CPUs alone")
    leaf.add_argument("--ranks-per-node", type=int, metavar="R", help="processes of a node (default: one a GPU, or 1)")
    leaf.add_argument("--cpus-per-rank", type=int, metavar="C", help="CPUs of a process (default: whole nodes)")
    leaf.add_argument("--spares", type=int, default=0, metavar="K", help="more nodes, that stand in for sick ones")
    _add_site(leaf)
    _add_run(leaf)


def _add_site(leaf: argparse.ArgumentParser) -> None:
    site = leaf.add_argument_group("the cluster")
    site.add_argument("--cluster", metavar="FILE", help="the site's defaults (~/.config/pretrain/cluster.toml)")
    site.add_argument("--partition", help="partition (default: the site's, or the cluster's)")
    site.add_argument("--time", help="time limit: minutes, H:MM:SS or D-HH:MM:SS (default: the partition's)")
    for name in ("account", "qos", "constraint"):
        site.add_argument(f"--{name}", help=f"{name} to ask for")
    site.add_argument("--container", metavar="[KIND:]IMAGE", help="image for the ranks; KIND: apptainer or pyxis")
    site.add_argument(
        "--launcher", choices=("agent", "srun"), help="agent: one task a node (default); srun: one task a rank"
    )
    site.add_argument(
        "--health",
        choices=("off", "warn", "exclude", "fail"),
        help="check of the nodes before each start: warn of sick ones (default), leave them out, or do not start",
    )
    site.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="variable to forward, or NAME*; may be repeated"
    )
    site.add_argument("--template", metavar="FILE", help="a batch script of your own, in place of job.sh.jinja")


def _add_run(leaf: argparse.ArgumentParser) -> None:
    run = leaf.add_argument_group("the job")
    run.add_argument("--name", help="its name (default: that of the run's folder)")
    run.add_argument("--grace", type=int, metavar="S", help="seconds to save in before the time limit (default: 120)")
    run.add_argument(
        "--max-requeues", type=int, metavar="N", help="times that it queues itself again (default: 10; 0 with --chain)"
    )
    run.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, one after the other, for a long run")
    run.add_argument(
        "--sweep",
        nargs="+",
        metavar="key=value,...",
        help="one run for each combination, as a job array: optim.lr=1e-4,3e-4 run.seed=1..5; keys that move together: "
        "model.hidden,model.layers=256:4,512:8",
    )
    run.add_argument("--at-once", type=int, default=0, metavar="K", help="runs of a sweep at a time (default: all)")
    run.add_argument(
        "--copy-code", action="store_true", help="run a copy of the code as it is now, in the run's folder"
    )
    run.add_argument("--dry-run", action="store_true", help="print the script and job.json; write and queue nothing")

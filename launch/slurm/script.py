"""The batch script of a job. Nothing that a user wrote stands in it unquoted, and nothing of it is run by a shell."""

import re
import shlex
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from launch.slurm.cluster import ClusterConfig
from launch.slurm.plan import JobPlan
from pretrain.config import resolve

TEMPLATE = Path(__file__).parent.parent / "templates" / "job.sh.jinja"
PLAIN = re.compile(r"[A-Za-z0-9_.,:;@%+=/&|*()\[\]-]*")


def render(plan: JobPlan, template: Path = TEMPLATE) -> str:
    """The script that `sbatch` takes."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # bash, not HTML
    environment.filters["quote"] = shlex.quote
    text = template.read_text(encoding="utf-8")
    paths = {
        "run_dir": str(plan.run_dir),
        "venv": plan.cluster.venv,
        "python": plan.python,
        "code": str(plan.code or ""),
    }
    try:
        return environment.from_string(text).render(
            **paths,
            directives=[directive(option, value) for option, value in options(plan)],
            script=str(plan.run_dir / "job.sh"),
            array=plan.indices is not None,
            modules=plan.cluster.modules,
            expandable=any(letter in path for path in paths.values() for letter in "$`"),
        )
    except TemplateError as error:
        raise ValueError(f"{template}: {error}") from None


def options(plan: JobPlan) -> list[tuple[str, str]]:
    """Options of sbatch, with their values; empty for those that have none."""
    cluster = plan.cluster
    logs = plan.run_dir / "logs" if plan.indices is None else plan.run_dir / "%3a" / "logs"
    found = [
        ("job-name", plan.name),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("constraint", cluster.constraint),
        ("time", cluster.time),
        ("nodes", str(plan.nodes + plan.spares)),
        ("gres", gres(cluster)),
        ("array", array(plan)),
        ("signal", f"B:USR1@{cluster.grace}"),
        ("open-mode", "append"),
        # Only the folder's own % signs are no patterns of SLURM's.
        ("output", str(logs).replace(str(plan.run_dir), str(plan.run_dir).replace("%", "%%")) + "/slurm-%j.out"),
        ("chdir", str(plan.folder)),
        ("export", ",".join(plan.environment)),
    ]
    # A node that is lost takes the job with it, unless the supervisor can go on with the others.
    kept = [("no-kill", "")] if plan.spares or (plan.nodes > 1 and shrinks(plan)) else []
    return [(option, value) for option, value in found if value] + [*tasks(plan), *kept, ("requeue", "")]


def shrinks(plan: JobPlan) -> bool:
    """Whether the number of replicas follows that of the nodes, see `launch.slurm.recipe.fewer_nodes`."""
    parallel = resolve(plan.recipe, plan.overrides)[0].parallel
    return -1 in (parallel.dp_replicate, parallel.dp_shard)


def tasks(plan: JobPlan) -> list[tuple[str, str]]:
    """How the CPUs of a node are taken: by rank, or all of them."""
    per_node, cpus = (plan.ranks_per_node, plan.cluster.cpus_per_rank)
    if plan.cluster.launcher == "agent":
        per_node, cpus = 1, cpus * plan.ranks_per_node
    shares = [("cpus-per-task", str(cpus))] if cpus else [("exclusive", ""), ("mem", "0")]
    return [("ntasks-per-node", str(per_node)), *shares]


def gres(cluster: ClusterConfig) -> str:
    if not cluster.gpus_per_node:
        return ""
    return ":".join(part for part in ("gpu", cluster.gpu_type, str(cluster.gpus_per_node)) if part)


def array(plan: JobPlan) -> str:
    """Such as "0-3,7%2"."""
    if plan.indices is None:
        return ""
    runs: list[list[int]] = []
    for index in plan.indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs) + (f"%{plan.at_once}" if plan.at_once else "")


def directive(option: str, value: str) -> str:
    """One line of options, as sbatch reads them: words in double quotes keep what is in them."""
    if not value:
        return f"--{option}"
    quoted = value if PLAIN.fullmatch(value) else '"' + value.replace('"', '\\"') + '"'
    return f"--{option}={quoted}"

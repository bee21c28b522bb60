"""What a site's cluster is like: defaults of `pretrain submit`, from a TOML file."""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

DEFAULT_FILE = Path("~/.config/pretrain/cluster.toml")
# Always forwarded where they are set: who and where the user is, and how text is written.
BASIC = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")  # of partitions, accounts, jobs
CONSTRAINT = re.compile(r"[A-Za-z0-9_.,:@+&|*()\[\]-]+")
MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
IMAGE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_.:/@#+-]*")


def _like(pattern: re.Pattern[str], what: str) -> AfterValidator:
    """A string of these characters alone, or empty: it goes into the job's script."""

    def check(value: str) -> str:
        if value and not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is no {what}; allowed: {pattern.pattern}")
        return value

    return AfterValidator(check)


def _plain(value: str) -> str:
    """A path that a script can hold; empty stays empty."""
    return str(plain_path(Path(value).expanduser())) if value else value


def plain_path(path: Path) -> Path:
    """Raises ValueError for a path with line breaks and the like, or with what SLURM takes out of paths of logs."""
    if any(not letter.isprintable() or letter == "\\" for letter in str(path)):
        raise ValueError(f"path {str(path)!r}: line breaks, control characters and backslashes cannot be in it; rename")
    return path


Name = Annotated[str, _like(NAME, "name")]
Constraint = Annotated[str, _like(CONSTRAINT, "constraint")]
Module = Annotated[str, _like(MODULE, "module")]
Variable = Annotated[str, _like(VARIABLE, "name of an environment variable (or NAME*)")]
Image = Annotated[str, _like(IMAGE, "image")]
PlainPath = Annotated[str, AfterValidator(_plain)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Container(Section):
    """`[container]`: what the ranks run in; the supervisor of the job stays outside, since it calls srun."""

    kind: Literal["none", "apptainer", "pyxis"] = Field("none", description="Program that runs the image")
    image: Image = Field("", description="Image: a file, or what the program can fetch")
    mounts: tuple[PlainPath, ...] = Field((), description="Folders that ranks see at the same path, beside the run's")
    python: PlainPath = Field("python3", description="Python inside, that has this package")


class ClusterConfig(Section):
    """The file of a site. Options of `pretrain submit` win over it."""

    partition: Name = Field("", description="Partition; empty: the cluster's default")
    account: Name = Field("", description="Account that pays")
    qos: Name = Field("", description="Quality of service")
    constraint: Constraint = Field("", description="Features that nodes must have, such as h100&ib")
    time: str = Field("", description="Time limit, as SLURM writes it; empty: the partition's")
    gpus_per_node: int = Field(0, ge=0, description="GPUs to take of each node; 0: train on CPUs")
    gpu_type: Name = Field("", description="Kind of GPU to ask for, as the cluster calls it; empty: any")
    ranks_per_node: int = Field(0, ge=0, description="Processes of a node; 0: one a GPU, or one")
    cpus_per_rank: int = Field(0, ge=0, description="CPUs of each process; 0: whole nodes, with all that they have")
    launcher: Literal["agent", "srun"] = Field(
        "agent", description="agent: one task a node, that starts and watches its ranks; srun: one task a rank"
    )
    grace: int = Field(120, ge=5, description="Seconds before the time limit at which the run saves and leaves")
    health: Literal["off", "warn", "exclude", "fail"] = Field(
        "warn", description="Check of the nodes before each start, and what becomes of sick ones"
    )
    venv: PlainPath = Field("", description="Virtual environment of the jobs; empty: the one that submits")
    python: PlainPath = Field("", description="Python of the jobs, instead of a virtual environment's")
    modules: tuple[Module, ...] = Field((), description="Environment modules to load")
    environment: tuple[Variable, ...] = Field((), description="Variables to forward: NAME, or NAME* for all such")
    container: Container = Container()


def load_cluster(file: str | None) -> ClusterConfig:
    """The site's defaults: of `file`, else of ~/.config/pretrain/cluster.toml where there is one.

    Raises FileNotFoundError, and ValueError (one line) for anything wrong in the file.
    """
    path = Path(file) if file else DEFAULT_FILE.expanduser()
    if not path.is_file():
        if file:
            raise FileNotFoundError(f"--cluster {file}: no such file")
        return ClusterConfig()
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return check_cluster(tree, str(path))


def check_cluster(tree: dict[str, Any], where: str) -> ClusterConfig:
    """A plain tree -> ClusterConfig; every error of it in one line that starts with `where`."""
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(detail) for detail in error.errors())) from None


def forwarded(cluster: ClusterConfig, more: list[str], environ: dict[str, str] | None = None) -> list[str]:
    """Names of the variables that a job gets from the shell that submits it. Raises ValueError for a `more` (of --env)
    that is no name, or is not set.
    """
    known = dict(os.environ if environ is None else environ)
    for name in more:
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"--env {name!r}: give the name of a variable, such as HF_HOME, or HF_* for all such")
        if not name.endswith("*") and name not in known:
            raise ValueError(f"--env {name}: is not set here; export it, or leave it out")
    patterns = (*BASIC, *cluster.environment, *more)
    wanted = {pattern for pattern in patterns if not pattern.endswith("*")}
    prefixes = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
    return sorted(name for name in known if VARIABLE.fullmatch(name) and (name in wanted or name.startswith(prefixes)))


def _explain(detail: Any) -> str:
    parts = [str(part) for part in detail["loc"]]
    key = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        known = [*ClusterConfig.model_fields, *(f"container.{name}" for name in Container.model_fields)]
        near = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.endswith(f".{key}")]
        return f"unknown key {key}{f' (did you mean {near[0]}?)' if near else ''}"
    if detail["type"] == "value_error":
        return f"{key} = {detail['ctx']['error']}"
    return f"{key} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"

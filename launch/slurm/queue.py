"""Questions to SLURM, asked with its own commands: what it has, which jobs it knows."""

import difflib
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.jobs import find_jobs

SECONDS = 60  # that a busy controller may take to answer
GPUS = re.compile(r"\bgpu(?::(?P<kind>[A-Za-z0-9_.-]+))?:(?P<count>\d+)")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


class NoAnswer(ValueError):
    """SLURM could not be asked, or refused to answer."""


@dataclass(frozen=True)
class Node:
    """gpus: number of each kind, "" where the cluster names none; usable: neither down nor drained nor reserved."""

    name: str
    host: str
    cpus: int
    gpus: dict[str, int]
    features: frozenset[str]
    usable: bool

    def count_gpus(self, kind: str = "") -> int:
        return sum(count for name, count in self.gpus.items() if kind in ("", name))


@dataclass(frozen=True)
class Partition:
    """max_time, default_time: seconds, None for no limit. max_nodes: of a job, None for no limit."""

    name: str
    up: bool
    max_time: int | None
    default_time: int | None
    max_nodes: int | None
    nodes: tuple[Node, ...]


def call(*command: str) -> str:
    """What a command of SLURM's prints. Raises NoAnswer with its own words when it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except FileNotFoundError:
        raise NoAnswer(f"{command[0]} is not here: submit from a machine of the cluster, or --dry-run") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} gave no answer in {SECONDS} s; is SLURM's controller up?") from None
    if done.returncode:
        words = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise NoAnswer(f"{command[0]} failed: {'; '.join(words) or f'exit code {done.returncode}'}")
    return done.stdout


def find_partition(name: str) -> Partition:
    """The partition `name`; empty: the default one. Raises ValueError for one that the cluster does not have."""
    rows = [_fields(line) for line in call("scontrol", "show", "partition", "--oneliner").splitlines() if line.strip()]
    known = {row["PartitionName"]: row for row in rows}
    if not name:
        name = next((key for key, row in known.items() if row.get("Default") == "YES"), "")
        if not name:
            raise ValueError(f"the cluster has no default partition; name one with --partition: {', '.join(known)}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"partition {name!r} is unknown{hint}; the cluster has {', '.join(known) or 'none'}")
    row = known[name]
    return Partition(
        name,
        row.get("State", "UP") == "UP",
        parse_time(row.get("MaxTime", "UNLIMITED")),
        parse_time(row.get("DefaultTime", "NONE")),
        int(row["MaxNodes"]) if row.get("MaxNodes", "").isdecimal() else None,
        find_nodes(name),
    )


def find_nodes(partition: str) -> tuple[Node, ...]:
    lines = call("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%n|%c|%G|%t|%f").splitlines()
    nodes = {}
    for name, host, cpus, gres, state, features in (line.split("|", 5) for line in lines):
        gpus: dict[str, int] = {}
        for found in GPUS.finditer(gres):
            gpus[found["kind"] or ""] = gpus.get(found["kind"] or "", 0) + int(found["count"])
        usable = not re.match(r"down|drain|drng|fail|maint|inval|resv|unk|.*\*$", state)
        nodes[name] = Node(name, host, int(cpus.rstrip("+")), gpus, frozenset(features.split(",")), usable)
    return tuple(nodes.values())


def max_array_size() -> int:
    """Largest number of jobs in an array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) - 1 if found else 1000


def alive_jobs(job_ids: Sequence[str]) -> dict[str, str]:
    """Those of the jobs that have not ended, and their states; "12_3" is a job of array 12."""
    jobs, unknown = find_jobs(job_ids)
    if unknown:
        raise NoAnswer(unknown)
    alive = {job.job: job.state for job in jobs if job.alive}
    return dict(sorted(alive.items(), key=lambda item: [*map(int, re.findall(r"\d+", item[0]))]))


def all_here(partition: Partition) -> bool:
    """Whether all nodes are this very machine."""
    here = platform.node()
    return all(node.host in (here, here.partition(".")[0]) for node in partition.nodes)


def parse_time(text: str) -> int | None:
    """Seconds of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds. None: no limit. Raises ValueError for anything else.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "N/A"):
        return None
    found = TIME.fullmatch(text)
    if not found:
        raise ValueError(f"time {text!r}: write minutes, hours:minutes:seconds or days-hours, such as 90 or 1-12:00:00")
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"]:
        return int(found["days"]) * 86400 + first * 3600 + second * 60 + third
    if found["third"]:
        return first * 3600 + second * 60 + third
    return first * 60 + second


def format_time(seconds: int) -> str:
    """As SLURM reads it."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    return f"{days}-{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)

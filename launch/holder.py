"""The process that trains in a run's folder, from the run's lock."""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.ranks import PARENT
from launch.rundir import read_json


@dataclass(frozen=True)
class Holder:
    """alive: None where that cannot be known, on another host. since: when it took the lock, seconds since 1970."""

    host: str
    pid: int
    since: float
    alive: bool | None

    def launcher(self) -> int:
        """The process to ask for an end: what started the ranks, or the rank itself."""
        try:
            process = psutil.Process(self.pid)
            parent = process.ppid()
            return parent if process.environ().get(PARENT) == str(parent) else self.pid
        except psutil.Error:
            return self.pid


def find_holder(run_dir: Path) -> Holder | None:
    """Who holds the lock, or held it when it was killed; None where nobody does."""
    path = run_dir / ".lock"
    record = read_json(path, tries=1)  # it is empty once its holder has let go
    if not isinstance(record, dict) or not isinstance(record.get("pid"), int):
        return None
    since = path.stat().st_mtime
    host, pid = str(record.get("host")), record["pid"]
    return Holder(host, pid, since, _alive(pid, since) if host == platform.node() else None)


def _alive(pid: int, since: float) -> bool:
    """Whether it is the process that took the lock: numbers are used again."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True

"""Starting ranks on this machine, with the environment that makes CPU runs fast."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from launch.ranks import Ranks
from launch.rundir import new_local_job

STARTED = "PRETRAIN_STARTED"  # marks a process that was started with its final environment
RECIPES = Path(__file__).parent.parent / "pretrain/recipes"
DEFAULT_FOLDER = "runs/default"  # of `pretrain.config`, which imports torch

# Huge pages for malloc, and no giving back of memory between steps: large activations are allocated again each step,
# and page faults and zeroing cost a third of a CPU step otherwise.
CPU_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc takes
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def joined() -> bool:
    """Whether this process is a rank already: started by us, torchrun or SLURM's agent."""
    return STARTED in os.environ or "RANK" in os.environ


def start_ranks(nproc: int | None, restarts: int = 0, run_dir: Path | None = None) -> int:
    """Run this same command as `nproc` ranks and wait; returns the first failing rank's exit code, or 0.

    None: one rank a GPU, or a single one. A single rank replaces this process. Signals are passed on to all ranks;
    when one fails the others are ended, so that nobody waits for it in a collective, and all are started anew up to
    `restarts` times. With `run_dir` each rank has its log there, and the console shows rank 0's.
    """
    gpus = count_gpus()
    world = nproc if nproc is not None else max(gpus, 1)
    if world < 1:
        raise ValueError(f"--nproc {nproc}: must be at least 1")
    if restarts < 0:
        raise ValueError(f"--restarts {restarts}: must be 0 or more")
    if gpus and world > gpus:
        raise ValueError(
            f"--nproc {world}: this machine has {gpus} GPUs for them; start at most one on each, or hide them for a "
            "run on the CPU (CUDA_VISIBLE_DEVICES=)"
        )
    # -P: the folder that the user stands in is no place to import from.
    command = [sys.executable, "-P", "-m", "launch.cli", *sys.argv[1:]]
    environment = rank_environment(world, gpus)
    if world == 1 and not restarts:
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    ranks = Ranks(command, environment, 0, world, world, "127.0.0.1", free_port(), run_dir, new_local_job())
    ranks.handle_signals()
    ranks.start()
    # torch is imported (2 s) while the ranks do the same.
    code: int = importlib.import_module("launch.elastic").supervise(
        ranks, group=0, groups=1, port=free_port(), restarts=restarts
    )
    ranks.tell()
    return code


def rank_environment(here: int, gpus: int) -> dict[str, str]:
    """This process's environment with what `here` ranks on this machine need."""
    environment = {**os.environ, STARTED: "1"}
    if not gpus:
        environment = {**CPU_MALLOC, **environment}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _count_cpus() // here)))
    environment.pop("WORLD_SIZE", None)  # of some other job
    return environment


def _count_cpus() -> int:
    """CPUs that this process may use: of a job, those that it was given."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run_folder(recipe: str, overrides: list[str]) -> Path | None:
    """`run.dir` of a run, read without torch: logs go there. None where the recipe has a mistake: the ranks say it."""
    try:
        for override in reversed(overrides):
            key, _, text = override.partition("=")
            if key.strip() == "run.dir":
                return Path(_value(text))
        path = Path(recipe)
        seen: set[Path] = set()
        while path not in seen:
            seen.add(path)
            if not (path.suffix == ".toml" and path.is_file()):
                path = RECIPES / f"{path.name}.toml"
            tree = tomllib.loads(path.read_text())
            if "dir" in tree.get("run", {}):
                return Path(tree["run"]["dir"])
            if "base" not in tree:
                return Path(DEFAULT_FOLDER)
            base = Path(f"{str(tree['base']).removesuffix('.toml')}.toml")
            path = path.parent / base if (path.parent / base).is_file() else base
    except (OSError, AttributeError, TypeError, ValueError):
        pass
    return None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def count_gpus() -> int:
    """NVIDIA GPUs that a process here would see, without importing torch (2 s)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    return listing.stdout.count("UUID: GPU")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

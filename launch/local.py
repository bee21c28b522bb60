"""Starting ranks on this machine, with the environment that makes CPU runs fast."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

STARTED = "PRETRAIN_STARTED"  # marks a process that was started with its final environment
GRACE_SECONDS = 30.0  # between asking ranks to end and ending them

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


def start_ranks(nproc: int | None) -> int:
    """Run this same command as `nproc` ranks and wait; returns the first failing rank's exit code, or 0.

    None: one rank a GPU, or a single one. A single rank replaces this process. Signals are passed on to all ranks;
    when one fails the others are ended, so that nobody waits for it in a collective.
    """
    gpus = count_gpus()
    world = nproc if nproc is not None else max(gpus, 1)
    if world < 1:
        raise ValueError(f"--nproc {nproc}: must be at least 1")
    if gpus and world > gpus:
        raise ValueError(
            f"--nproc {world}: this machine has {gpus} GPUs for them; start at most one on each, or hide them for a "
            "run on the CPU (CUDA_VISIBLE_DEVICES=)"
        )
    base = {**os.environ, STARTED: "1"}
    if not gpus:
        base = {**CPU_MALLOC, **base}
        base.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    base.pop("WORLD_SIZE", None)  # of some other job
    # -P: the folder that the user stands in is no place to import from.
    command = [sys.executable, "-P", "-m", "launch.cli", *sys.argv[1:]]
    if world == 1:
        sys.stdout.flush()
        os.execve(command[0], command, base)
    base |= {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL if len(asked) > 2 else number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for index in range(world):
        if not asked:
            ranks.append(subprocess.Popen(command, env=base | {"RANK": str(index), "LOCAL_RANK": str(index)}))
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while any(rank.poll() is None for rank in ranks):
        gone = [rank for rank in ranks if rank.poll()]
        if gone:
            failed = min(gone, key=lambda rank: rank.returncode)  # killed by a signal: what made the others fail
            _end(ranks)
            index = ranks.index(failed)
            if failed.returncode not in (1, 2):  # those have said why themselves
                how = f"signal {-failed.returncode}" if failed.returncode < 0 else f"exit code {failed.returncode}"
                print(f"pretrain: rank {index} of {len(ranks)} died ({how}); the others were ended", file=sys.stderr)
            return failed.returncode if failed.returncode > 0 else 1
        time.sleep(0.05)
    return next((abs(rank.returncode) for rank in ranks if rank.returncode), 0)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """A failing rank gives the others a moment to fail for the same reason, then they are ended."""
    deadline = time.monotonic() + 2.0
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.terminate()
    for rank in ranks:
        try:
            rank.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


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

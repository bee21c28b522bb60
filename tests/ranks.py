"""Runs a function on several gloo ranks, one process and one thread each.

Processes are forked from a server that has imported torch once a test session: the first world takes seconds
to start, later ones a fraction of one. Still, run many layouts inside one world where a test has many.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE = 5  # seconds to exit after the result has been sent

_context = multiprocessing.get_context("forkserver")
# What ranks would otherwise import one by one; optimizers and FSDP import torch._dynamo at their first step.
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "tests.ranks",
    ]
)


class RankError(AssertionError):
    """A rank raised, died or did not end in time. The text holds its traceback and last output."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Calls `function(*args)` on `world` ranks and returns what each returned, in rank order.

    `function` stands at the top level of a module. Arguments and results are copied, never shared. At the
    first failure, or after `timeout` seconds, all ranks are ended and RankError is raised, with the traceback of
    the rank that failed first, or the stacks of those that were still running.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            job = pickle.dumps((function, args))
            process = _context.Process(target=_rank, args=(job, rank, world, folder, timeout, sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _collect(pipes, Path(folder), time.monotonic() + timeout)
            for process in processes:
                process.join(GRACE)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], folder: Path, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            logs = "\n".join(_log(folder, rank) for rank in late)
            raise RankError(f"ranks {late} did not end in time\n{logs}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                result, error = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died\n{_log(folder, rank)}") from None
            if error:
                raise RankError(f"rank {rank} failed\n{error}\n{_log(folder, rank)}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _log(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
    return f"--- output of rank {rank} ---\n{text}" if text else ""


def _rank(job: bytes, rank: int, world: int, folder: str, timeout: float, sender: Connection) -> None:
    with (Path(folder) / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(max(timeout - 1, 0.5), file=2)
    signal.alarm(int(timeout + GRACE + 10))  # in case that the parent is killed and cannot end this process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # needs no name resolution of the host
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        function, args = pickle.loads(job)
        message = pickle.dumps((function(*args), None))
        dist.barrier()  # gloo sometimes aborts at exit without it
        dist.destroy_process_group()
    except BaseException:
        message = pickle.dumps((None, traceback.format_exc()))
    sender.send_bytes(message)
    sys.stdout.flush()
    os._exit(0)  # after a failure, leaving the usual way could wait for the other ranks

"""Many short worlds of processes, one after another: a function on N ranks, with a time limit.

Ranks are forked from a server that has imported torch once, so a world starts in a fraction of a second, and each is
fresh: what hangs, dies or leaves its process groups in disorder harms no other. `pretrain run` starts its ranks in
`launch.local`, once and for long.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.world import World

GRACE_SECONDS = 3.0  # for the other ranks to fail for the same reason
OURS = re.compile(r'File ".*?((?:launch|pretrain|parallel|data_pipeline|checkpoints)/[\w/]+\.py)", line (\d+) in (\w+)')

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """How a world ended. results: what each rank returned; refused: the ValueError that every rank raised; problem:
    anything else, in a few lines. One of the three.
    """

    results: list[Any] | None = None
    refused: str = ""
    problem: str = ""


def warm_up(modules: Sequence[str]) -> None:
    """Start the server, which imports `modules` meanwhile. Of use only before the first world."""
    _context.set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]


def run_world(
    function: Callable[..., Any], size: int, *args: Any, device: str = "cpu", timeout: float = 120.0, threads: int = 1
) -> Ended:
    """Call `function(world, *args)` on `size` ranks; it stands at the top of a module and returns what JSON can hold.

    device: "cpu" (gloo), or "cuda" (NCCL, rank i on GPU i). After `timeout` seconds all ranks are ended, and the
    problem says where each one stood. No process group is made for a single rank. threads: of one rank; small models
    on a busy machine are many times slower with two than with one.
    """
    with tempfile.TemporaryDirectory(prefix="pretrain-ranks-") as folder:
        pipes, processes = [], []
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            job = (function, args, rank, size, device, folder, timeout, threads, sender)
            process = _context.Process(target=_rank, args=job, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            replies = _collect(pipes, time.monotonic() + timeout)
            if len(replies) == size:
                for process in processes:
                    process.join(GRACE_SECONDS)
            return _judge(replies, size, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline: float) -> dict[int, dict[str, Any]]:
    """Rank -> its reply, or {"died": true}; those that did not end in time are missing."""
    replies: dict[int, dict[str, Any]] = {}
    while len(replies) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in replies]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                replies[rank] = json.loads(pipes[rank].recv_bytes())
            except EOFError:
                replies[rank] = {"died": True}
            if "result" not in replies[rank]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return replies


def _judge(replies: dict[int, dict[str, Any]], size: int, timeout: float, folder: Path) -> Ended:
    bad = {rank: reply for rank, reply in replies.items() if "result" not in reply}
    if not bad and len(replies) == size:
        return Ended(results=[replies[rank]["result"] for rank in range(size)])
    refused = [reply for reply in bad.values() if "refused" in reply]
    if common := [reply for reply in refused if reply["common"]] or (refused if len(refused) == size else []):
        return Ended(refused=common[0]["refused"])
    if died := [rank for rank, reply in bad.items() if "died" in reply]:
        return Ended(problem=f"rank {died[0]} of {size} died{_last_words(folder, died[0])}")
    if bad:
        own = {rank: reply for rank, reply in sorted(bad.items()) if not _is_echo(reply)} or bad
        who = "every rank" if len(own) == size else f"rank {min(own)} of {size}"
        return Ended(problem=f"{who} failed: {own[min(own)].get('failed') or own[min(own)]['refused']}")
    late = [rank for rank in range(size) if rank not in replies]
    where = "; ".join(f"rank {rank} in {_stood(folder, rank)}" for rank in late)
    return Ended(problem=f"hangs: no end after {timeout:.0f} s; {where}")


def _is_echo(reply: dict[str, Any]) -> bool:
    """Of another rank's failure: the connection to it was lost."""
    return any(sign in reply.get("failed", "") for sign in ("Connection", "connection", "gloo/transport", "NCCL"))


def _last_words(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return f": {lines[-1]}" if lines else ""


def _stood(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.stacks"
    found = OURS.findall(path.read_text(errors="replace")) if path.exists() else []
    return "{}:{} ({})".format(*found[0]) if found else "code that is not ours"


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    device: str,
    folder: str,
    timeout: float,
    threads: int,
    sender: Connection,
) -> None:
    log = (Path(folder) / f"rank-{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    stacks = (Path(folder) / f"rank-{rank}.stacks").open("w")
    faulthandler.dump_traceback_later(0.7 * timeout, file=stacks)  # in time, also where the machine is busy
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # needs no name resolution of the host
    torch.set_num_threads(threads)
    try:
        reply = {"result": _run(function, args, World(rank, size, _device(device, rank), size), folder, timeout)}
    except ValueError as error:
        # What all ranks check alike: the others may see this one gone before they come to it.
        reply = {"refused": " ".join(str(error).split()), "common": getattr(error, "on_all_ranks", False)}
    except BaseException as error:
        traceback.print_exc()
        calls = [f'File "{f.filename}", line {f.lineno} in {f.name}' for f in traceback.extract_tb(error.__traceback__)]
        found = OURS.findall("\n".join(calls))
        where = " ({}:{} {})".format(*found[-1]) if found else ""
        reply = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"}
    sender.send_bytes(json.dumps(reply).encode())
    sys.stdout.flush()
    os._exit(0)  # after a failure, leaving the usual way could wait for the other ranks


def _device(device: str, rank: int) -> torch.device:
    if device != "cuda":
        return torch.device(device)
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _run(function: Callable[..., Any], args: tuple[Any, ...], world: World, folder: str, timeout: float) -> Any:
    if world.size == 1:
        return function(world, *args)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store = dist.FileStore(str(Path(folder) / "store"), world.size)
    # Longer than the limit: a collective that nobody answers is to be found waiting, not to fail first.
    limit = timedelta(seconds=2 * timeout + 60)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
    result = function(world, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result

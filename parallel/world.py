"""This process among the others: who it is, which device it owns, joining and leaving."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# In the messages of torch's RuntimeErrors: gloo's transport, NCCL, and the store that processes meet at.
LOST_PEER = ("gloo", "NCCL", "TCPStore")


@dataclass(frozen=True)
class World:
    """rank: 0 to size - 1 over all nodes; device: the one that this process computes on; per_node: processes of a node,
    0 for all of them.
    """

    rank: int
    size: int
    device: torch.device
    per_node: int = 0


@contextmanager
def join_world(timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the processes that torchrun or `pretrain run --nproc` started (they set RANK, WORLD_SIZE, LOCAL_RANK).

    Without those variables this process is alone and no process group is made. On leaving without an error all ranks
    meet at a barrier first: gloo sometimes aborts when one process is gone before the others are done. An error that
    not all ranks have alike (those carry `on_all_ranks`) gets a note that names the rank. Raises ConnectionError where
    a collective failed because another process is gone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(rank, size, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", "0")))
    except Exception as error:  # the process is about to exit: leaving the group cleanly could hang
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER):
            error = ConnectionError(
                f"another process is gone or does not answer ({str(error).splitlines()[0]}); its own output says why"
            )
        if not getattr(error, "on_all_ranks", False):
            error.add_note(f"rank {rank} of {size}")
        raise error
    dist.barrier()
    dist.destroy_process_group()

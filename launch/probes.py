"""What a health check measures on and between ranks."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.places import find_shards
from data_pipeline.remote import is_remote
from pretrain.config import resolve

Clock = Callable[[], float]
CPU = torch.device("cpu")
MATMUL_SECONDS = 0.5
TOKEN_SECONDS = 4.0  # for a file to be seen by other hosts
ROUNDS = 5  # of what is short and disturbed easily: the best counts
LINK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# Elements of the matrices' sides, bytes that are reduced: milliseconds each.
SIZES = {"cpu": (384, 4 << 20), "cuda": (4096, 64 << 20)}


def describe_device(device: torch.device) -> dict[str, Any]:
    """{"device", "driver", "memory_gb": free, 1e9 bytes}"""
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        line = driver.read_text().splitlines()[0] if driver.exists() else torch.version.cuda or ""
        free = torch.cuda.mem_get_info(device)[0]
        return {"device": torch.cuda.get_device_name(device), "driver": line, "memory_gb": round(free / 1e9, 2)}
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"device": f"cpu, {os.cpu_count()} cores", "driver": os.uname().release, "memory_gb": round(free / 1e9, 2)}


def time_matmul(device: torch.device) -> float:
    """Seconds of one matrix product, the best of those that fit into MATMUL_SECONDS."""
    side = SIZES[device.type][0]
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best, until = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < until:
        begin = time.perf_counter()
        a @ a
        _finish(device)
        best = min(best, time.perf_counter() - begin)
    return best


def time_all_reduce(device: torch.device) -> tuple[float, float]:
    """Collective. (seconds of the smallest all-reduce, bytes a second of a large one: 2 (n - 1) / n of its size)."""
    size = SIZES[device.type][1]
    latency = _best(torch.zeros(2, device=device), device)
    seconds = _best(torch.zeros(size // 4, device=device), device)
    world = dist.get_world_size()
    return latency, 2 * (world - 1) / world * size / seconds


def _best(tensor: torch.Tensor, device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        _finish(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def clock_offsets(clock: Clock) -> float:
    """Collective. Seconds by which this rank's clock is ahead of rank 0's, to half a round trip."""
    rank, offset = dist.get_rank(), torch.zeros(1, dtype=torch.float64)
    for other in range(1, dist.get_world_size()):
        if rank == 0:
            rounds = [_ask(other, clock) for _ in range(ROUNDS)]
            dist.send(torch.tensor([min(rounds)[1]], dtype=torch.float64), other)
        elif rank == other:
            for _ in range(ROUNDS):
                dist.recv(offset, 0)
                dist.send(torch.tensor([clock()], dtype=torch.float64), 0)
            dist.recv(offset, 0)
    return float(offset)


def _ask(other: int, clock: Clock) -> tuple[float, float]:
    """(seconds of the round trip, how far the other clock is ahead)"""
    answer = torch.zeros(1, dtype=torch.float64)
    begin = clock()
    dist.send(answer, other)
    dist.recv(answer, other)
    end = clock()
    return end - begin, float(answer) - (begin + end) / 2


def time_links(device: torch.device = CPU) -> dict[str, float] | None:
    """Collective. Of the link to the next rank, from memory of `device`: {"to", "latency_s", "bytes_per_s"}; all links
    at once but for their ends, so that each process has one at a time. None: this rank is alone, or the second of two.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = None
    for color in range(3):
        for first in range(world if world > 2 else world - 1):
            # The link from the last rank of an odd number has a turn of its own.
            if (2 if first == world - 1 and world % 2 else first % 2) != color:
                continue
            second = (first + 1) % world
            if rank == first:
                found = {"to": second, **_measure_link(second, device)}
            elif rank == second:
                _answer_link(first, device)
        dist.barrier()
    return found


def _measure_link(other: int, device: torch.device) -> dict[str, float]:
    small, large = torch.zeros(1, device=device), torch.zeros(LINK_BYTES[device.type] // 4, device=device)
    latencies, speeds = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        dist.send(small, other)
        dist.recv(small, other)
        _finish(device)
        latencies.append((time.perf_counter() - begin) / 2)
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        dist.send(large, other)
        dist.recv(small, other)
        _finish(device)
        speeds.append(LINK_BYTES[device.type] / (time.perf_counter() - begin))
    return {"latency_s": min(latencies), "bytes_per_s": max(speeds)}


def _answer_link(other: int, device: torch.device) -> None:
    small, large = torch.zeros(1, device=device), torch.zeros(LINK_BYTES[device.type] // 4, device=device)
    for _ in range(ROUNDS):
        dist.recv(small, other)
        dist.send(small, other)
    for _ in range(ROUNDS):
        dist.recv(large, other)
        dist.send(small, other)


def sees_token(folder: Path, name: str, text: str) -> bool:
    """Whether the file that rank 0 wrote is in what this rank takes for the run's folder."""
    until = time.monotonic() + TOKEN_SECONDS
    while True:
        try:
            if (folder / name).read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def seen_shards(run_dir: Path) -> dict[str, int]:
    """Source -> bytes of its first, middle and last shard, and -1 where there are none; sources elsewhere left out."""
    recipe = next((run_dir / name for name in ("submitted.toml", "config.toml") if (run_dir / name).is_file()), None)
    if recipe is None:
        return {}
    found = {}
    for source in resolve(str(recipe))[0].data.sources:
        if is_remote(source.shards):
            continue
        try:
            paths = [shard.path for shard in find_shards(source.shards)]
            found[source.shards] = sum(paths[i].stat().st_size for i in {0, len(paths) // 2, len(paths) - 1})
        except OSError:
            found[source.shards] = -1
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

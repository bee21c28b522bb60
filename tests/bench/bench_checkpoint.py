"""Saving and loading a sharded checkpoint, against a file copy with fsync and against plain DCP.

    python -m tests.bench.bench_checkpoint [--mb 400] [--rounds 4] [--folder DIR]

Two ranks hold fp32 weights and two AdamW moments as FSDP2 shards (rows cut in two). Every round runs each contestant
once; figures are medians in MB/s of the whole checkpoint. Loads are measured with the files out of the page cache.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoints.store import CheckpointStore
from tests.ranks import run_ranks

WORLD = 2
ROWS, COLUMNS = 1024, 1024
PIECE = 1 << 20


def make_state(megabytes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (WORLD,))
    count = max(1, megabytes * 10**6 // (3 * ROWS * COLUMNS * 4))

    def tensor() -> Tensor:
        return DTensor.from_local(torch.randn(ROWS // WORLD, COLUMNS), mesh, [Shard(0)], run_check=False)

    model = {f"layers.{index}.weight": tensor() for index in range(count)}
    moments = {f"{moment}.{name}": tensor() for name in model for moment in ("exp_avg", "exp_avg_sq")}
    return model, moments


def copy_with_fsync(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while piece := reader.read(PIECE):
            writer.write(piece)
        os.fsync(writer.fileno())


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def rotated(contestants: dict[str, Callable[[], object]], start: int) -> list[str]:
    """Another one goes first in every round, as each inherits the disk's queue from the one before."""
    names = list(contestants)
    start %= len(names)
    return names[start:] + names[:start]


def measure(folder: Path, megabytes: int, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Bytes of the checkpoint, and the seconds that each contestant took in each round."""
    rank = dist.get_rank()
    model, moments = make_state(megabytes)
    together = {**model, **moments}
    size = float(sum(tensor.numel() * 4 for tensor in together.values()))
    source = folder / f"source-{rank}"
    source.write_bytes(os.urandom(PIECE) * int(size / WORLD / PIECE))
    store = CheckpointStore(folder / "ours")
    writer, reader = dcp.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader
    saves: dict[str, Callable[[], object]] = {
        "copy": lambda: copy_with_fsync(source, folder / "copy" / str(rank)),
        "ours": lambda: store.save(1, model, moments, {}),
        "dcp": lambda: dcp.save(together, checkpoint_id=str(folder / "dcp")),
        "dcp safetensors": lambda: dcp.save(
            together, storage_writer=writer(str(folder / "dcp safetensors"), save_distributed=True)
        ),
    }
    loads: dict[str, Callable[[], object]] = {
        "ours": lambda: store.load(1, model, moments),
        "dcp": lambda: dcp.load(together, checkpoint_id=str(folder / "dcp")),
        "dcp safetensors": lambda: dcp.load(together, storage_reader=reader(str(folder / "dcp safetensors"))),
    }
    times: dict[str, list[float]] = {}
    for start in range(rounds):
        for name in rotated(saves, start):
            if rank == 0:  # nobody overwrites: all start without the files of the round before
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).mkdir()
            times.setdefault(f"save {name}", []).append(seconds(saves[name]))
        for name in rotated(loads, start):
            drop_from_cache(folder)
            times.setdefault(f"load {name}", []).append(seconds(loads[name]))
    return size, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=400, help="size of the checkpoint in MB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size, times = run_ranks(measure, WORLD, Path(folder), options.mb, options.rounds, timeout=900)[0]
    medians = {name: size / 1e6 / statistics.median(values) for name, values in times.items()}
    for name, speed in medians.items():
        all_speeds = " ".join(f"{size / 1e6 / value:.0f}" for value in times[name])
        print(f"{name:24s} {speed:7.0f} MB/s   ({all_speeds})")
    print(f"save: {medians['save ours'] / medians['save copy']:.2f} of a copy with fsync (aim 0.70), "
          f"{medians['save ours'] / medians['save dcp']:.2f} of DCP (aim > 1)")  # fmt: skip
    print(f"load: {medians['load ours'] / medians['load dcp']:.2f} of DCP (aim >= 1)")


if __name__ == "__main__":
    main()

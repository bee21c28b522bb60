"""Saving and loading a sharded checkpoint, against a file copy with fsync and against plain DCP.

    python -m tests.bench.bench_checkpoint [--mb 1200] [--rounds 5] [--folder DIR]

Two ranks hold fp32 weights and two AdamW moments as FSDP2 shards (rows cut in two). Every round runs each contestant
once, another one first each time; medians, in MB/s of the whole checkpoint. Loads are measured with the files out of
the page cache. "blocks": seconds until a save in the background lets training go on, its buffers allocated before.
"commit": the part of our save that makes it safe against kills (temporary folder, state, manifest, fsync of folders,
rename), of which the fsync of the shards themselves is no part.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoints import commit
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


class Committing:
    """The seconds that rank 0 spends on the safety of a save."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("_make_temp", "_commit"):
            setattr(commit, name, self._timed(getattr(commit, name)))

    def _timed(self, action: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: object) -> None:
            start = time.perf_counter()
            action(*args)
            self.seconds += time.perf_counter() - start

        return wrapper

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


def measure(folder: Path, megabytes: int, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Bytes of the checkpoint, and the seconds that each contestant took in each round."""
    rank = dist.get_rank()
    model, moments = make_state(megabytes)
    together = {**model, **moments}
    size = float(sum(tensor.numel() * 4 for tensor in together.values()))
    source = folder / f"source-{rank}"
    source.write_bytes(os.urandom(PIECE) * int(size / WORLD / PIECE))
    store, behind = CheckpointStore(folder / "ours"), CheckpointStore(folder / "ours behind")
    writer, reader = dcp.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader
    stager, committing = DefaultStager(StagingOptions(False, False, False, False)), Committing()
    saves: dict[str, Callable[[], object]] = {
        "copy": lambda: copy_with_fsync(source, folder / "copy" / str(rank)),
        "ours": lambda: store.save(1, model, moments, {}),
        "dcp": lambda: dcp.save(together, checkpoint_id=str(folder / "dcp")),
        "dcp safetensors": lambda: dcp.save(
            together, storage_writer=writer(str(folder / "dcp safetensors"), save_distributed=True)
        ),
    }
    running: list[Any] = []
    group = dist.new_group()  # on the default one its thread's collectives meet ours, and both wait for ever
    starts: dict[str, Callable[[], object]] = {
        "ours behind": lambda: behind.save_async(1, model, moments, {}),
        "dcp behind": lambda: running.append(
            dcp.async_save(together, checkpoint_id=str(folder / "dcp behind"), process_group=group)
        ),
        "dcp behind, kept": lambda: running.append(
            dcp.async_save(
                together, checkpoint_id=str(folder / "dcp behind, kept"), async_stager=stager, process_group=group
            )
        ),
    }
    loads: dict[str, Callable[[], object]] = {
        "ours": lambda: store.load(1, model, moments),
        "dcp": lambda: dcp.load(together, checkpoint_id=str(folder / "dcp")),
        "dcp safetensors": lambda: dcp.load(together, storage_reader=reader(str(folder / "dcp safetensors"))),
    }
    times: dict[str, list[float]] = {}

    def fresh(name: str) -> None:
        if rank == 0:  # nobody overwrites: all start without the files of the round before
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()

    behind.prepare(model, moments)
    for turn in range(-1, rounds):  # the first is for memory that is touched once
        for name in rotated(saves, turn):
            fresh(name)
            times.setdefault(f"save {name}", []).append(seconds(saves[name]))
            if name == "ours":
                times.setdefault("commit", []).append(committing.take())
        for name in rotated(starts, turn):
            fresh(name)
            times.setdefault(f"blocks {name}", []).append(seconds(starts[name]))
            for future in running:
                future.result()
            running.clear()
            behind.finish()
            committing.take()
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder / name)
            dist.barrier()
        for name in rotated(loads, turn):
            drop_from_cache(folder)
            times.setdefault(f"load {name}", []).append(seconds(loads[name]))
    behind.close()
    return size, {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=1200, help="size of the checkpoint in MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size, times = run_ranks(measure, WORLD, Path(folder), options.mb, options.rounds, timeout=3000)[0]
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, middle in medians.items():
        if name.startswith(("save", "load")):
            each = " ".join(f"{size / 1e6 / value:.0f}" for value in times[name])
            print(f"{name:24s} {size / 1e6 / middle:7.0f} MB/s   ({each})")
        else:
            each = " ".join(f"{value:.3f}" for value in times[name])
            print(f"{name:24s} {middle:7.3f} s      ({each})")
    ratios = [
        ("save: time of a copy with fsync / ours", "save copy", "save ours", "aim 0.70"),
        ("save: DCP / ours", "save dcp", "save ours", "aim above 1"),
        ("load: DCP / ours", "load dcp", "load ours", "aim 1 or more"),
        ("blocks: ours / DCP's async_save", "blocks ours behind", "blocks dcp behind", "aim 1 or less"),
        ("blocks: ours / with buffers kept", "blocks ours behind", "blocks dcp behind, kept", "aim 1 or less"),
        ("blocks: ours / our save", "blocks ours behind", "save ours", "aim 0.15 or less"),
        ("commit / our save", "commit", "save ours", "aim 0.05 or less"),
    ]
    for text, above, below, aim in ratios:
        by_round = [a / b for a, b in zip(times[above], times[below], strict=True)]
        print(
            f"{text}: {medians[above] / medians[below]:.2f} ({aim}); by round: median "
            f"{statistics.median(by_round):.2f}, {min(by_round):.2f} to {max(by_round):.2f}"
        )


if __name__ == "__main__":
    main()

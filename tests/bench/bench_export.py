"""Exporting a checkpoint to Hugging Face, against a copy of the same bytes with fsync; and how much memory it takes.

    python -m tests.bench.bench_export [--layers 12] [--rounds 4] [--folder DIR]

A Llama-shaped fp32 model; every round runs each contestant once, another one first. Files are in the page cache, as
after training. `export` writes alone; `export and compare` also imports every tensor back and compares it bit for bit.
Memory is the peak of a process of its own that does nothing else (VmHWM: Python, torch and transformers included). The
proof by logits, which needs the whole model in fp32, is in neither.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from checkpoints.hf.convert import export
from checkpoints.hf.verify import prove_tensors
from checkpoints.store import CheckpointStore
from launch.commands.convert import native_tensors
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import BRANDS
from tests.bench.bench_checkpoint import copy_with_fsync, rotated

LLAMA = BRANDS["llama"]


def make_checkpoint(config: DecoderConfig, folder: Path) -> Path:
    shapes, ties = native_tensors(config)
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    return CheckpointStore(folder).save(1, model, {}, {}, ties=ties)


def copy_all(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.glob("*.safetensors"):
        copy_with_fsync(path, target / path.name)


def export_model(config: DecoderConfig, checkpoint: Path, out: Path, compare: bool) -> None:
    shapes, _ = native_tensors(config)

    def prove(temp: Path) -> None:
        prove_tensors(checkpoint, shapes, LLAMA, temp, None)

    export(checkpoint, config.model_dump(mode="json"), shapes, LLAMA, out, prove=prove if compare else None)


def peak_of_export(config: DecoderConfig, checkpoint: Path, out: Path, compare: bool) -> int:
    """Peak resident bytes of this process after an export."""
    export_model(config, checkpoint, out, compare)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure_peak(config: DecoderConfig, checkpoint: Path, out: Path, compare: bool) -> int:
    """`peak_of_export` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_export, config, checkpoint, out, compare).result()


def measure_seconds(config: DecoderConfig, checkpoint: Path, out: Path, rounds: int) -> dict[str, list[float]]:
    """The seconds that each contestant took in each round."""
    contestants: dict[str, Callable[[], object]] = {
        "copy and fsync": lambda: copy_all(checkpoint / "model", out),
        "export": partial(export_model, config, checkpoint, out, compare=False),
        "export and compare": partial(export_model, config, checkpoint, out, compare=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(-1, rounds):  # the first round warms the imports and the page cache
        for name in rotated(contestants, index):
            start = time.perf_counter()
            contestants[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Export to Hugging Face beside a copy with fsync")
    parser.add_argument("--layers", type=int, default=12, help="depth; 12 layers are 670 MB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    config = DecoderConfig(vocab_size=26000, hidden=960, ffn=2560, layers=args.layers, heads=15, kv_heads=5)
    shapes, _ = native_tensors(config)
    largest = 4 * max(map(math.prod, shapes.values()))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint = make_checkpoint(config, folder / "checkpoints")
        num_bytes = sum(path.stat().st_size for path in (checkpoint / "model").iterdir())
        seconds = measure_seconds(config, checkpoint, folder / "out", args.rounds)
        peaks = {
            "export": measure_peak(config, checkpoint, folder / "alone", compare=False),
            "export and compare": measure_peak(config, checkpoint, folder / "compared", compare=True),
        }
    base = statistics.median(seconds["copy and fsync"])
    print(f"{num_bytes / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB; {args.rounds} rounds, medians")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20s} {num_bytes / 1e6 / median:7.0f} MB/s  {median / base:.2f} x the copy's time (limit 1.5)")
    limit = 2 * largest + 400e6
    for name, peak in peaks.items():
        print(f"{name:20s} {peak / 1e6:7.0f} MB at the peak (limit 2 x largest + 400 MB = {limit / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()

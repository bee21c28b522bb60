"""Exporting a checkpoint to Hugging Face, against a copy of the same bytes with fsync.

    python -m tests.bench.bench_export [--layers 12] [--rounds 4] [--folder DIR]

A Llama-shaped fp32 model; every round runs each contestant once, another one first. Files are in the page cache, as
after training. `export` writes alone; `export and compare` also imports every tensor back and compares it bit for bit.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
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


def measure(config: DecoderConfig, folder: Path, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the weights, and the seconds that each contestant took in each round."""
    checkpoint = make_checkpoint(config, folder / "checkpoints")
    shapes, _ = native_tensors(config)
    out = folder / "out"
    write = partial(export, checkpoint, config.model_dump(mode="json"), shapes, LLAMA, out)

    def prove(temp: Path) -> None:
        prove_tensors(checkpoint, shapes, LLAMA, temp, None)

    contestants: dict[str, Callable[[], object]] = {
        "copy and fsync": lambda: copy_all(checkpoint / "model", out),
        "export": write,
        "export and compare": lambda: write(prove=prove),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(-1, rounds):  # the first round warms the imports and the page cache
        for name in rotated(contestants, index):
            start = time.perf_counter()
            contestants[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    return sum(path.stat().st_size for path in (checkpoint / "model").iterdir()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Export to Hugging Face beside a copy with fsync")
    parser.add_argument("--layers", type=int, default=12, help="depth; 12 layers are 520 MB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    config = DecoderConfig(vocab_size=26000, hidden=960, ffn=2560, layers=args.layers, heads=15, kv_heads=5)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        num_bytes, seconds = measure(config, Path(folder), args.rounds)
    base = statistics.median(seconds["copy and fsync"])
    print(f"{num_bytes / 1e6:.0f} MB, {args.rounds} rounds, medians")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20s} {num_bytes / 1e6 / median:7.0f} MB/s  {median / base:.2f} x the copy's time")


if __name__ == "__main__":
    main()

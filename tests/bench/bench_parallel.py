"""Two gloo processes of one thread each: our FSDP2 run beside a bare `fully_shard` loop and `transformers.Trainer`.

    python -m tests.bench.bench_parallel [--rounds 3] [--steps 20]

The model of tests.bench.bench_train: Llama-shaped, 12,587,904 parameters, sequence 512, bf16 autocast, gradient
clipping 1.0, fused AdamW; 4 rows a process and step. Every candidate runs in two processes of its own, in turn; a
figure is the tokens/s of both together in the median of the steps after the first five. "bare loop" is the same model
and loss under torch's `fully_shard`, written out with nothing else around it; "engine" is ours without data, log and
schedule; "loop" is what `pretrain run` does, of which the share outside of `train_step` is shown too (loading waits,
metrics, schedule). Those three run with the allocator settings that `pretrain run` gives its
ranks; the Trainer (DistributedDataParallel) as its users start it, and once more with our settings.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from launch.local import CPU_MALLOC
from parallel.world import World, join_world
from pretrain import train as train_module
from pretrain.data import build_tiny_shards
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train, train_step
from tests.bench import bench_train
from tests.bench.bare import WithLoss, random_batch

RANKS, ROWS, LENGTH = 2, 4, 512
TOKENS = RANKS * ROWS * LENGTH
SETTINGS = ("train.micro_batch=4", "train.global_batch=8")


def loop(folder: str, steps: int, compiled: bool, world: World) -> list[float]:
    """`pretrain run`, seconds of each step as it logs them."""
    config = bench_train.config(folder, steps, f"train.compile={'on' if compiled else 'off'}", *SETTINGS)
    inside: list[float] = []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        found = train_step(*args)
        inside.append(time.perf_counter() - start)
        return found

    train_module.train_step = timed
    train(config, world)
    seconds = bench_train.logged_seconds(folder)
    outside = [whole - step for whole, step in zip(seconds, inside, strict=True)][bench_train.WARMUP :]
    if world.rank == 0:
        print(f"OUTSIDE {statistics.median(outside) / statistics.median(seconds[bench_train.WARMUP :])}", flush=True)
    return seconds


def engine_alone(folder: str, steps: int, compiled: bool, world: World) -> list[float]:
    settings = bench_train.config(folder, steps, *SETTINGS)
    objective = OBJECTIVES["causal"][1](settings.objective)
    if compiled:
        objective.compile()
    engine = build_engine(settings, world, objective, compiled)
    batch = objective.collate(random_batch(ROWS, LENGTH))

    def step() -> None:
        values, _ = train_step(engine, objective, [batch], 1e-4)
        float(values["loss"])

    return bench_train.time_calls(step, steps)


def bare_loop(folder: str, steps: int, compiled: bool, world: World) -> list[float]:
    settings = bench_train.config(folder, steps, *SETTINGS)
    objective = OBJECTIVES["causal"][1](settings.objective)
    root = WithLoss(settings, objective)
    if compiled:
        objective.compile()
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in root.model.layers.values():
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-4, fused=True)
    batch = objective.collate(random_batch(ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = root(batch) / (ROWS * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)

    return bench_train.time_calls(step, steps)


def trainer(folder: str, steps: int, compiled: bool, world: World) -> list[float]:
    return bench_train.trainer(f"{folder}/{world.rank}", steps, compiled, rows=ROWS, ddp_backend="gloo")


CANDIDATES = {
    "loop, compiled": (loop, True, CPU_MALLOC),
    "engine, compiled": (engine_alone, True, CPU_MALLOC),
    "bare loop, compiled": (bare_loop, True, CPU_MALLOC),
    "Trainer DDP, compiled": (trainer, True, {}),
    "Trainer DDP, compiled, our malloc": (trainer, True, CPU_MALLOC),
    "Trainer DDP, eager": (trainer, False, {}),
}
RATIOS = [
    ("engine, compiled", "bare loop, compiled", 0.95),
    ("loop, compiled", "Trainer DDP, compiled", 1.3),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run, compiled, _ = CANDIDATES[args.only]
        with join_world() as world:
            seconds = run(args.folder, args.steps, compiled, world)
            if world.rank == 0:
                print(f"RESULT {TOKENS / statistics.median(seconds[bench_train.WARMUP :])}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_shards(Path(folder) / "data")
        rates: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        overheads: list[float] = []
        for turn in range(args.rounds):
            for index, name in enumerate(CANDIDATES):
                rate, outside = measure(name, f"{folder}/{turn}-{index}", folder, args.steps)
                rates[name].append(rate)
                overheads += outside
                print(f"round {turn + 1}: {name:34} {rates[name][-1]:8,.0f} tokens/s", flush=True)
    bench_train.report(rates, RATIOS)
    print(f"loop outside of train_step: {statistics.median(overheads):.2%} of a step (aim: below 1 %)")


def measure(name: str, work: str, folder: str, steps: int) -> tuple[float, list[float]]:
    """Tokens/s; and, of the loop, its share of a step outside of `train_step`."""
    Path(work).mkdir()
    Path(work, "data").symlink_to(Path(folder, "data"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.bench.bench_parallel", "--only", name, "--folder", work]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"CUDA_VISIBLE_DEVICES": ""} | CANDIDATES[name][2]
    ranks = [
        subprocess.Popen(
            [*command, "--steps", str(steps)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate(timeout=900) for rank in ranks]
    lines = outputs[0][0].splitlines()
    results = [line for line in lines if line.startswith("RESULT ")]
    if any(rank.returncode for rank in ranks) or not results:
        raise RuntimeError(f"{name} failed:\n" + "\n".join(text[-3000:] for pair in outputs for text in pair))
    return float(results[0].split()[1]), [float(line.split()[1]) for line in lines if line.startswith("OUTSIDE ")]


if __name__ == "__main__":
    main()

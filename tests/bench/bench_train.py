"""The whole training step on this CPU: ours beside `transformers.Trainer`, tokens/s, interleaved medians.

    python -m tests.bench.bench_train [--rounds 3] [--steps 12]

Model: Llama-shaped, 12,587,904 parameters (recipe bench-12m); sequence 512, micro-batch 8, fp32 parameters, bf16
autocast, gradient clipping 1.0, AdamW. Every candidate runs in a process of its own, in turn, with two threads;
ours with the allocator settings that `pretrain run` gives its ranks, the peers as their users start them. A
candidate's figure is the median of its steps after the first five; "bare step" is our engine without the loop
(no data, schedule, logging), "our loop" what `pretrain run` does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.local import CPU_MALLOC
from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.data import build_tiny_shards
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train

TOKENS = 8 * 512
WARMUP = 5
ALONE = World(0, 1, torch.device("cpu"))


def config(folder: str, steps: int, *overrides: str) -> RunConfig:
    shards = f'data.sources=[{{shards="{folder}/data/train-*.tar"}}]'
    quiet = ["checkpoint.every=1000000", f"train.steps={steps}", "log.every=5"]
    return resolve("bench-12m", [shards, f"run.dir={folder}/run", *quiet, *overrides])[0]


def our_loop(folder: str, steps: int, compiled: bool) -> list[float]:
    train(config(folder, steps, f"train.compile={'on' if compiled else 'off'}", "run.resume=never"), ALONE)
    return logged_seconds(folder)


def logged_seconds(folder: str) -> list[float]:
    lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines]


def bare_step(folder: str, steps: int, compiled: bool) -> list[float]:
    settings = config(folder, steps)
    objective = OBJECTIVES["causal"][1](settings.objective)
    if compiled:
        objective.compile()
    engine = build_engine(settings, ALONE, objective, compiled)
    tokens = torch.randint(0, 8192, (8, 513))
    batch = objective.collate({"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()})
    count = torch.tensor(TOKENS)

    def step() -> None:
        float(engine.forward_backward([batch], count)["loss"])
        engine.clip_grad_norm()
        engine.step(1e-4)

    return time_calls(step, steps)


def trainer(folder: str, steps: int, compiled: bool, rows: int = 8, **arguments: Any) -> list[float]:
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            self.times.append(time.perf_counter())

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    assert model.num_parameters() == 12_587_904
    tokens = torch.randint(0, 8192, (TOKENS // 512 * steps, 512))
    clock = Clock()
    settings = transformers.TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=steps,
        per_device_train_batch_size=rows,
        bf16=True,
        use_cpu=True,
        torch_compile=compiled,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        report_to="none",
        logging_steps=10**6,
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[clock]).train()
    return [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]


def time_calls(step: Callable[[], None], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


CANDIDATES: dict[str, tuple[Callable[[str, int, bool], list[float]], bool, dict[str, str]]] = {
    "our loop, compiled": (our_loop, True, CPU_MALLOC),
    "bare step, compiled": (bare_step, True, CPU_MALLOC),
    "our loop, eager": (our_loop, False, CPU_MALLOC),
    "Trainer, compiled": (trainer, True, {}),
    "Trainer, eager": (trainer, False, {}),
}
RATIOS = [
    ("our loop, compiled", "Trainer, compiled", 1.6),
    ("our loop, compiled", "Trainer, eager", 2.0),
    ("our loop, compiled", "bare step, compiled", 0.98),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run, compiled, _ = CANDIDATES[args.only]
        seconds = run(args.folder, args.steps, compiled)
        print(f"RESULT {TOKENS / statistics.median(seconds[WARMUP:])}")
        return
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_shards(Path(folder) / "data")
        rates: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for turn in range(args.rounds):
            for name in CANDIDATES:
                rates[name].append(measure(name, f"{folder}/{turn}-{len(name)}", folder, args.steps))
                print(f"round {turn + 1}: {name:20} {rates[name][-1]:8,.0f} tokens/s", flush=True)
    report(rates, RATIOS)


def measure(name: str, work: str, folder: str, steps: int) -> float:
    Path(work).mkdir()
    Path(work, "data").symlink_to(Path(folder, "data"))
    command = [sys.executable, "-m", "tests.bench.bench_train", "--only", name, "--folder", work, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), **CANDIDATES[name][2]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(results[0].split()[1])


def report(rates: dict[str, list[float]], ratios: list[tuple[str, str, float]]) -> None:
    print(f"\n{'':34} {'median':>9} {'min':>9} {'max':>9}  tokens/s")
    for name, values in rates.items():
        print(f"{name:34} {statistics.median(values):9,.0f} {min(values):9,.0f} {max(values):9,.0f}")
    for ours, peer, aim in ratios:
        ratio = statistics.median(rates[ours]) / statistics.median(rates[peer])
        print(f"{ours} / {peer}: {ratio:.2f} (aim {aim})")


if __name__ == "__main__":
    main()

"""What our wrapping costs: a training step of an engine beside the same model in the bare library.

    python -m tests.bench.bench_engines [--rounds 40] [--only megatron "deepspeed ZeRO 3"]

Two processes on one host with gloo, a decoder of 7M parameters, 4 rows of 128 tokens each, fp32, gradients clipped,
torch's fused AdamW in both. Ours is `pretrain.train.train_step`: the count of targets over all processes, losses as
sums, the norm before the update. Bare is what the library's own examples do: for DeepSpeed forward, backward, step of
another instance; for Megatron-Core its schedule, its reduction of gradients, its clipping and its distributed
optimizer, called on the modules that our engine has built. Both live in the same processes and take turns at every
step, so that whatever else the machine does hits both. The figures are medians over all pairs of ours / bare: of wall
time, and of the processor time of one process, which a busy machine disturbs less.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.optim import build_optimizer
from pretrain.train import train_step
from tests.bench.bare import WithLoss, random_batch
from tests.ranks import run_ranks

RANKS, ROWS, LENGTH = 2, 4, 128
AIM = 1.03
WARMUP = 5
SETTINGS = [
    "train.precision=fp32",
    "train.compile=off",
    f"train.global_batch={RANKS * ROWS}",
    f"train.micro_batch={ROWS}",
    f"data.seq_len={LENGTH}",
    "model.hidden=256",
    "model.layers=6",
    "model.ffn=704",
    "model.heads=8",
    "model.vocab_size=8192",
    "model.max_seq_len=128",
]
CASES = {"megatron": ["engine=megatron"]} | {
    f"deepspeed ZeRO {zero}": ["engine=deepspeed", f"deepspeed.zero={zero}"] for zero in range(4)
}


def wrapped(engine: Any, objective: Any) -> Callable[[], None]:
    batch = objective.collate(random_batch(ROWS, LENGTH))

    def step() -> None:
        values, _ = train_step(engine, objective, [batch], 1e-4)
        float(values["loss"])

    return step


def bare_megatron(engine: Any, objective: Any, settings: RunConfig) -> Callable[[], None]:
    from megatron.core.distributed import finalize_model_grads  # in the ranks alone, as DeepSpeed
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from parallel.engines.megatron_host import on_host

    models, (optimizer,) = engine._models, engine.optimizer._parts
    optimizer.config.clip_grad = settings.optim.clip_grad_norm
    batch = objective.collate(random_batch(ROWS, LENGTH))
    reported: list[torch.Tensor] = []

    def forward_step(batches: Iterator[Any], model: Any) -> Any:
        batch = next(batches)
        hidden = objective.forward(model.module, batch, None)

        def loss(hidden: torch.Tensor) -> Any:
            value = objective.loss(model.module, hidden, batch)["loss"] / (RANKS * ROWS * LENGTH)
            reported[:] = [value.detach()]
            return value, torch.zeros((), dtype=torch.int), {}

        return hidden, loss

    def step() -> None:
        with on_host():
            for model in models:
                model.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([batch]),
                model=models[0],
                num_microbatches=1,
                seq_length=LENGTH,
                micro_batch_size=ROWS,
            )
            finalize_model_grads(models, None)
            optimizer.step()
        float(reported[0])

    return step


def bare_deepspeed(objective: Any, settings: RunConfig) -> Callable[[], None]:
    import deepspeed  # in the ranks alone: it changes the process that imports it

    root = WithLoss(settings, objective)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings.deepspeed.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    optimizer = build_optimizer(root.model.named_parameters(), settings.optim)
    engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config)
    batch = objective.collate(random_batch(ROWS, LENGTH))

    def step() -> None:
        loss = engine(batch) / (ROWS * LENGTH)
        engine.backward(loss)
        engine.step()
        float(loss)

    return step


def take_turns(overrides: list[str], rounds: int) -> list[list[list[float]]]:
    """[round][ours, bare][seconds of a step by the clock, of the processor]"""
    settings = resolve("tiny", [*SETTINGS, *overrides])[0]
    objective = OBJECTIVES["causal"][1](settings.objective)
    engine = build_engine(settings, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), objective)
    bare = (
        bare_deepspeed(objective, settings)
        if settings.engine == "deepspeed"
        else (bare_megatron(engine, objective, settings))
    )
    steps = wrapped(engine, objective), bare
    pairs = []
    for turn in range(WARMUP + rounds):
        seconds = [[0.0, 0.0], [0.0, 0.0]]
        for index in (0, 1) if turn % 2 else (1, 0):
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            steps[index]()
            seconds[index] = [time.perf_counter() - start[0], time.process_time() - start[1]]
        pairs.append(seconds)
    return pairs[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    for name in args.only:
        pairs = run_ranks(take_turns, RANKS, CASES[name], args.rounds, timeout=900)[0]
        for column, clock in enumerate(("wall", "processor")):
            ratios = sorted(ours[column] / other[column] for ours, other in pairs)
            other = statistics.median(pair[1][column] for pair in pairs)
            low, middle, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
            verdict = "" if middle <= AIM else f", above the aim of {AIM}"
            print(
                f"{name}, {clock} time: bare {other * 1000:.0f} ms a step, ours / bare {middle:.3f} "
                f"(half of all pairs: {low:.3f} to {high:.3f}){verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Attention back ends on this CPU: forward and backward, as a ratio to SDPA, interleaved, medians.

    python -m tests.bench.bench_attention --lengths 512 1024 2048 4096 --dtype bf16 fp32 --mode compiled eager

The crossover constants in pretrain/models/layers/attention.py come from here. The process restarts itself with the
allocator settings that CPU ranks run under: without them the large score matrices of `matmul` are unmapped and
faulted in again at every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from launch.local import CPU_MALLOC
from pretrain.models.layers.attention import AttentionMask, attention

TOKENS = 4096  # in a batch, whatever the sequence length
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BACKENDS = ("sdpa", "matmul", "document")


def make_masks(length: int) -> dict[str, AttentionMask]:
    """The masks measured; documents have exponential lengths with a mean of a quarter row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(TOKENS).exponential_(4 / length, generator=generator).long() + 8
    ends = lengths.cumsum(0)
    ids = torch.searchsorted(ends, torch.arange(TOKENS), right=True).view(-1, length)
    return {
        "causal": AttentionMask(),
        "documents": AttentionMask.packed(ids),
        "window 256": AttentionMask(window=256),
    }


def prepare(mask: AttentionMask, backend: str, compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, backend=backend)

    return torch.compile(run, fullgraph=True) if compiled else run


def measure(length: int, dtype: torch.dtype, compiled: bool, rounds: int, clock: Callable[[], float]) -> None:
    shape = (TOKENS // length, length)
    q = torch.randn(*shape, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(*shape, KV_HEADS, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    for name, mask in make_masks(length).items():
        torch._dynamo.reset()
        if name == "causal":
            candidates = {backend: prepare(mask, backend, compiled) for backend in BACKENDS[:2]}
        elif length <= 256 and mask.window is not None:
            continue
        else:
            candidates = {backend: prepare(mask, backend, compiled) for backend in BACKENDS}
        times: dict[str, list[float]] = {backend: [] for backend in candidates}
        for step in range(rounds + 2):
            for backend, run in candidates.items():
                start = clock()
                torch.autograd.grad(run(q, k, v), (q, k, v), grad)
                if step >= 2:
                    times[backend].append(clock() - start)
        medians = {backend: statistics.median(values) for backend, values in times.items()}
        cells = [
            f"{backend} {value * 1e3:6.1f} ms ({medians['sdpa'] / value:4.2f}x)" for backend, value in medians.items()
        ]
        kind = "compiled" if compiled else "eager"
        print(f"S={length:5d} {str(dtype)[6:]:9s} {kind:9s} {name:11s} {'  '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="attention back ends on this CPU, ratios to SDPA")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--mode", choices=["compiled", "eager"], nargs="+", default=["compiled", "eager"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time of one thread: for a machine with other work on it"
    )
    options = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in CPU_MALLOC.items()):
        command = [sys.executable, "-m", "tests.bench.bench_attention", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **CPU_MALLOC})
    torch.manual_seed(0)
    clock = time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {TOKENS} tokens, forward and backward")
    for length in options.lengths:
        for dtype in options.dtype:
            for mode in options.mode:
                measure(length, DTYPES[dtype], mode == "compiled", options.rounds, clock)


if __name__ == "__main__":
    main()

"""A mixture-of-experts layer, forward and backward: ours beside a loop over experts and transformers' Mixtral block.

    python -m tests.bench.bench_moe [--rounds 5]

8 experts, 2 a token, width 256, expert width 512, 4096 tokens; fp32, and bf16 autocast; then 64 experts. Candidates
take turns in one process; a figure is the median of all rounds. "loop" is the textbook's: for each expert, find its
tokens, compute, add to the result. "products alone" are the nine matrix products of an evenly loaded expert, for each:
no layer can take less, so loop / products is the most that loop / ours could be. Memory is taken as `pretrain run`
takes it.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from launch.local import CPU_MALLOC
from pretrain.models.layers.moe import MixtureOfExperts, MoE

ROWS, LENGTH, HIDDEN, FFN, TOP_K = 8, 512, 256, 512, 2
AIMS = {("ours", "loop"): 1.5, ("ours", "transformers"): 1.0}


def ours(experts: int) -> MixtureOfExperts:
    return MixtureOfExperts(MoE(experts=experts, top_k=TOP_K, ffn=FFN, balance="none"), HIDDEN, "silu")


class Loop(nn.Module):
    """One expert after the other, over the parameters of our layer."""

    def __init__(self, experts: int):
        super().__init__()
        self.layer = ours(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weight, chosen = self.layer.router(flat).softmax(-1).topk(TOP_K, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for expert, (gate, up, down) in enumerate(zip(*self.layer.experts.weights(), strict=True)):
            token, place = torch.where(chosen == expert)
            rows = flat[token]
            rows = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            out.index_add_(0, token, (rows * weight[token, place, None]).to(out.dtype))
        return out.view_as(x)


def mixtral(experts: int) -> nn.Module:
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=experts, num_experts_per_tok=TOP_K
    )
    return MixtralSparseMoeBlock(config)


def with_best_implementation(experts: int) -> dict[str, nn.Module]:
    """transformers picks among implementations of its experts by this key of the config."""
    found = {}
    for name in ("eager", "grouped_mm"):  # "batched_mm" copies the weights for each row: 10 GB here
        block = mixtral(experts)
        block.experts.config._experts_implementation = name
        found[f"transformers, {name}"] = block
    return found


def step(layer: nn.Module, x: torch.Tensor, bf16: bool) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()

    return run


def products(experts: int, bf16: bool) -> Callable[[], None]:
    """Three of forward, each with two of backward."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    rows = ROWS * LENGTH * TOP_K // experts
    x, inner = torch.randn(rows, HIDDEN, dtype=dtype), torch.randn(rows, FFN, dtype=dtype)
    into, out = torch.randn(FFN, HIDDEN, dtype=dtype), torch.randn(HIDDEN, FFN, dtype=dtype)

    def run() -> None:
        for _ in range(experts):
            for _ in range(2):  # gate, up
                x @ into.t(), inner @ into, inner.t() @ x
            inner @ out.t(), x @ out, x.t() @ inner

    return run


def measure(experts: int, bf16: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of each candidate."""
    layers = {"ours": ours(experts), "loop": Loop(experts)}
    layers |= with_best_implementation(experts)
    x = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    steps = {}
    for name, layer in layers.items():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.02)
        steps[name] = step(layer, x, bf16)
        steps[name]()
    steps["products alone"] = products(experts, bf16)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            for _ in range(3):
                run()
            times[name].append((time.perf_counter() - start) / 3 * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in CPU_MALLOC.items()):
        command = [sys.executable, "-m", "tests.bench.bench_moe", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **CPU_MALLOC})
    for experts, bf16 in ((8, False), (8, True), (64, False)):
        found = measure(experts, bf16, args.rounds)
        peer = min(value for name, value in found.items() if name.startswith("transformers"))
        print(f"{experts} experts, {'bf16 autocast' if bf16 else 'fp32'}")
        for name, value in found.items():
            print(f"  {name:28} {value:8.1f} ms   {value / found['ours']:.2f} x ours")
        print(f"  loop / ours {found['loop'] / found['ours']:.2f} (aim {AIMS['ours', 'loop']} at 8; ", end="")
        print(f"at most {found['loop'] / found['products alone']:.2f}), ", end="")
        print(f"transformers' best / ours {peer / found['ours']:.2f} (aim {AIMS['ours', 'transformers']})", flush=True)


if __name__ == "__main__":
    main()

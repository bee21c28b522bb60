"""Experts in one kernel on a GPU: their results against fp64, and their rate against dense products of as many FLOPs.

    python -m tests.bench.gpu_experts

Exits with 1 on a mismatch or below the aim. 64 experts, 8 a token, in bf16, forward and backward.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.layers.experts import Experts, grouped, loop

EXPERTS, TOP_K, HIDDEN, FFN, TOKENS = 64, 8, 2048, 1024, 16384
TOLERANCE = 2e-2  # relative, in norm
AIM = 0.7  # of the dense rate
REPEATS = 20


def routed(rows: int, experts: int, seed: int, device: str) -> Tensor:
    """Rows of each expert: uneven, as routers leave them."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(experts, generator=generator) + 0.5
    chosen = torch.multinomial(shares, rows, replacement=True, generator=generator)
    return torch.bincount(chosen, minlength=experts).to(device)


def make(experts: int, hidden: int, ffn: int, device: str) -> Experts:
    layer = Experts(experts, hidden, ffn, "silu").to(device, torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    return layer


def errors(device: str, experts: int = 8, rows: int = 1000, hidden: int = 256, ffn: int = 128) -> dict[str, float]:
    """Relative, of the output and of each gradient, against fp64 one expert after the other."""
    narrow, wide = make(experts, hidden, ffn, device), Experts(experts, hidden, ffn, "silu").to(device).double()
    wide.load_state_dict(narrow.state_dict())
    counts = routed(rows, experts, 0, device)
    x = torch.randn(rows, hidden, device=device).bfloat16()
    found = []
    for layer, compute in ((narrow, grouped), (wide, loop)):
        own = x.to(layer.gate.dtype, copy=True).requires_grad_()
        out = compute(own, counts, layer.weights(), layer.activation)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype))
        found.append([out.detach(), own.grad, *(p.grad for p in layer.parameters())])
    names = ("output", "input", *dict(narrow.named_parameters()))
    pairs = zip(names, *found, strict=True)
    return {name: float((ours.double() - exact).norm() / exact.norm()) for name, ours, exact in pairs}


def milliseconds(step: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step().sum().backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[REPEATS // 4 :]) * 1000


def rates() -> tuple[float, float]:
    """Milliseconds of experts, and of one network that sees each row once."""
    rows = TOKENS * TOP_K
    layer, dense = make(EXPERTS, HIDDEN, FFN, "cuda"), make(1, HIDDEN, FFN, "cuda")
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    counts = routed(rows, EXPERTS, 1, "cuda")
    gate, up, down = (weight[0] for weight in dense.weights())
    one_kernel = milliseconds(lambda: grouped(x, counts, layer.weights(), layer.activation))
    return one_kernel, milliseconds(lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_experts: no CUDA device here; run it on a machine that has one", file=sys.stderr)
        return 2
    off = errors("cuda")
    print("experts in one kernel, relative errors: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
    experts, dense = rates()
    print(f"{EXPERTS} experts {experts:.2f} ms, dense {dense:.2f} ms: {dense / experts:.2f} of its rate (aim {AIM})")
    return int(max(off.values()) > TOLERANCE or dense / experts < AIM)


if __name__ == "__main__":
    sys.exit(main())

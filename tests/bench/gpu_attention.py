"""Every attention back end on a GPU against an fp64 reference: outputs, gradients, times.

    python -m tests.bench.gpu_attention

Prints a table and exits with 1 on a mismatch. Needs only torch and a CUDA device; flash-attn is used when installed.
A line reads: mask, back end, relative errors of the output and of the gradients of q, k and v, milliseconds of one
forward and backward at the large size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.models.layers.attention import BACKENDS, AttentionMask, attention, choose_backend, prepare_mask

CHECKED = {"batch": 2, "length": 640}  # not a multiple of any kernel's larger tiles; small enough for fp64
TIMED = {"batch": 4, "length": 4096}
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, in norm
REPEATS = 10


def make_masks(batch: int, length: int) -> Iterator[tuple[str, AttentionMask]]:
    generator = torch.Generator().manual_seed(0)
    ends = torch.empty(64).exponential_(6 / (batch * length), generator=generator).long().add(16).cumsum(0)
    documents = torch.searchsorted(ends, torch.arange(batch * length), right=True).view(batch, length)
    padded = torch.where(torch.arange(length) < length - 100, documents, -1)
    prefix = torch.linspace(0, length // 2, batch).long()
    yield "causal", AttentionMask()
    yield "bidirectional", AttentionMask(causal=False)
    yield "sliding", AttentionMask(window=length // 8)
    yield "prefix", AttentionMask(prefix=prefix)
    yield "documents", AttentionMask.packed(documents)
    yield "documents+sliding", AttentionMask.packed(documents, window=length // 16)
    yield "documents+padding", AttentionMask.packed(padded, causal=False)


def make_inputs(batch: int, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    made = [torch.randn(batch, length, h, HEAD_DIM, generator=generator, device="cuda", dtype=dtype) for h in heads]
    return [x.requires_grad_() for x in made[:3]], made[3]


def run(inputs: list[Tensor], grad: Tensor, mask: AttentionMask, backend: str, softcap: float | None) -> list[Tensor]:
    q, k, v = inputs
    out = attention(q, k, v, mask, backend=backend, softcap=softcap)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def milliseconds(inputs: list[Tensor], grad: Tensor, mask: AttentionMask, backend: str, softcap: float | None) -> float:
    for _ in range(3):
        run(inputs, grad, mask, backend, softcap)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        run(inputs, grad, mask, backend, softcap)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / REPEATS


def check(mask_name: str, dtype: torch.dtype, softcap: float | None) -> bool:
    """Print a line for every back end that can do this mask; whether all agreed."""
    small, large = dict(make_masks(**CHECKED))[mask_name], dict(make_masks(**TIMED))[mask_name]
    inputs, grad = make_inputs(**CHECKED, dtype=dtype)
    timed_inputs, timed_grad = make_inputs(**TIMED, dtype=dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(exact_inputs, grad.double(), small.to("cuda"), "reference", softcap)
    length = TIMED["length"]
    sizes: dict[str, Any] = {"queries": length, "keys": length, "head_dim": HEAD_DIM, "softcap": softcap}
    auto = choose_backend(large, device="cuda", dtype=dtype, **sizes)[0]
    agreed = True
    for backend in BACKENDS:
        try:
            choose_backend(large, device="cuda", dtype=dtype, backend=backend, **sizes)
        except ValueError:
            continue
        if backend == "reference":
            continue
        label = f"{mask_name:18s} {str(dtype)[6:]:9s} softcap {softcap!s:5s} {backend:8s}"
        try:
            masks = [
                prepare_mask(mask, backend, queries=size["length"], keys=size["length"], device="cuda")
                for mask, size in ((small, CHECKED), (large, TIMED))
            ]
            got = run(inputs, grad, masks[0], backend, softcap)
            errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, exact, strict=True)]
            good = all(error < TOLERANCE[dtype] for error in errors)
            time = f"{milliseconds(timed_inputs, timed_grad, masks[1], backend, softcap):8.2f} ms"
        except Exception as error:  # a table of all back ends is wanted even when one of them breaks
            good, errors, time = False, [], f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        agreed &= good
        flags = f"{'' if good else 'MISMATCH '}{'<- auto' if backend == auto else ''}"
        print(label, " ".join(f"{error:.1e}" for error in errors), time, flags, flush=True)
    return agreed


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_attention: no CUDA device here; run it on a machine that has one", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, timed at {TIMED}, {HEADS}/{KV_HEADS} heads")
    names = [name for name, _ in make_masks(**CHECKED)]
    results = [check(name, torch.bfloat16, None) for name in names]
    results += [check(name, torch.bfloat16, 30.0) for name in ("causal", "documents")]
    results += [check(name, torch.float32, None) for name in ("causal", "documents")]
    print("all agree" if all(results) else "MISMATCH: see above")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

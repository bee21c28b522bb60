"""The attention core: one function over a declarative mask, several back ends, and the choice among them.

Shape letters: B batch, S queries, T keys, H query heads, K key-value heads, D and V head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pretrain.models.layers import attention_backends as backends
from pretrain.models.layers.attention_documents import document
from pretrain.models.layers.attention_mask import AttentionMask
from pretrain.models.layers.linear import product_dtype

__all__ = ["BACKENDS", "AttentionCore", "AttentionMask", "attention", "choose_backend", "prepare_mask"]

HALF = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # the largest that the flash kernels take

# The most queries at which `matmul` is taken on a CPU: against `sdpa` under a full or causal mask, and against
# `document` under documents or a window. Measured by tests/bench/bench_attention.py --cpu-time (torch 2.13, AVX-512
# with bf16, compiled, forward and backward of 4096 tokens, documents of a quarter row; CPU ms of one thread):
#
#     sequence                    512   1024   2048   4096                  512   1024   2048   4096
#     bf16 causal      sdpa       107    158    224    414   fp32           122    188    305    542
#                      matmul      35     61    106    226                   95    158    332    741
#     bf16 documents   matmul      35     57    109    233   fp32            94    161    314    617
#                      document    78    101    167    344                   51     97    211    443
#     bf16 window 256  matmul      43     48     73    120   fp32           100    115      -    309
#                      document   103    124    131    132                  104    125      -    136
#
# bf16 stops at 2048 though matmul still leads: it keeps all S x T weights for the backward, 120 MiB a row and layer
# at 4096 with 6 heads.
CPU_MATMUL_DENSE = {torch.bfloat16: 2048, torch.float32: 1024}
CPU_MATMUL_SPARSE = {torch.bfloat16: 2048, torch.float32: 256}


@dataclass(frozen=True, eq=False)
class Call:
    """What the choice of a back end depends on."""

    mask: AttentionMask
    device: str  # device type
    dtype: torch.dtype
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    softcap: float | None


@dataclass(frozen=True)
class Backend:
    """A back end: its function, and what keeps it from doing a call (None: nothing)."""

    run: Callable[..., Tensor]
    obstacle: Callable[[Call], str | None]


def _no_obstacle(call: Call) -> str | None:
    return None


def _sdpa_obstacle(call: Call) -> str | None:
    return "has no softcap" if call.softcap is not None else None


def _document_obstacle(call: Call) -> str | None:
    if call.device != "cpu":
        return f"runs on cpu, not {call.device}"
    if call.dtype == torch.float16:
        return "takes float32, float64 and bfloat16, not float16"
    return _packed_obstacle(call) or _sdpa_obstacle(call)


def _packed_obstacle(call: Call) -> str | None:
    mask = call.mask
    if mask.prefix is not None:
        return "has no prefix mask"
    if mask.spans is not None:
        return "has no spans that see each other both ways"
    if call.head_dim != call.value_dim:
        return f"needs equal head sizes, got {call.head_dim} for keys and {call.value_dim} for values"
    if call.queries != call.keys and not (call.device == "cuda" and mask.documents is None):
        return f"needs as many queries as keys, got {call.queries} and {call.keys}"
    if mask.documents is not None and mask.packing is None and torch.compiler.is_compiling():
        return "needs the documents' boundaries when compiled (AttentionMask.packed)"
    return None


def _kernel_obstacle(call: Call) -> str | None:
    if call.device != "cuda":
        return f"runs on cuda, not {call.device}"
    if call.dtype not in HALF:
        return f"takes bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim > FLASH_HEAD_DIM or call.head_dim % 8:
        return f"needs a head size that is a multiple of 8 up to {FLASH_HEAD_DIM}, got {call.head_dim}"
    return _packed_obstacle(call)


def _varlen_obstacle(call: Call) -> str | None:
    return _kernel_obstacle(call) or _sdpa_obstacle(call)


def _flash_obstacle(call: Call) -> str | None:
    return _kernel_obstacle(call) if backends.HAS_FLASH_ATTN else "needs the flash-attn package (pip extra gpu)"


def _flex_obstacle(call: Call) -> str | None:
    return None if call.device == "cuda" else f"runs on cuda, not {call.device}"


def _document(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: None) -> Tensor:
    return document(q, k, v, mask, scale)


BACKENDS = {
    "flash": Backend(backends.flash, _flash_obstacle),
    "varlen": Backend(backends.varlen, _varlen_obstacle),
    "flex": Backend(backends.flex, _flex_obstacle),
    "sdpa": Backend(backends.sdpa, _sdpa_obstacle),
    "matmul": Backend(backends.matmul, _no_obstacle),
    "document": Backend(_document, _document_obstacle),
    "reference": Backend(backends.reference, _no_obstacle),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of ``q`` [B, S, H, D] over ``k`` [B, T, K, D], ``v`` [B, T, K, V]: [B, S, H, V].

    H is a multiple of K; query heads g * H/K to (g + 1) * H/K - 1 share key-value head g. With T > S the
    queries are the last S positions. ``scale`` defaults to D ** -0.5; ``softcap`` c turns each score s into
    c * tanh(s / c). Under autocast the inputs are cast to its dtype. Padding (negative document ids) gives 0.
    Raises ValueError for shapes that do not fit and for a named ``backend`` that cannot do the call.
    """
    _check_shapes(q, k, mask)
    dtype = product_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    S, T, D = q.shape[1], k.shape[1], q.shape[3]
    call = Call(mask, q.device.type, q.dtype, S, T, D, v.shape[3], softcap)
    name = _choose(call)[0] if backend == "auto" else _checked(backend, call)
    out = BACKENDS[name].run(q, k, v, mask, D**-0.5 if scale is None else scale, softcap)
    if mask.documents is not None and (mask.packing is None or mask.packing.has_padding):
        out = out.masked_fill((mask.documents[:, T - S :] < 0)[:, :, None, None], 0.0)
    return out


class AttentionCore(nn.Module):
    """:func:`attention` as a module, so that a plan can name it: context parallelism takes the place of its forward."""

    def __init__(self, scale: float | None = None, softcap: float | None = None):
        super().__init__()
        self.scale, self.softcap = scale, softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return attention(q, k, v, mask, scale=self.scale, softcap=self.softcap)


def choose_backend(
    mask: AttentionMask,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[str, str]:
    """The back end that :func:`attention` takes for such a call, and why, for one log line.

    ``queries`` and ``keys`` are the lengths S and T in tokens; ``dtype`` is the one computed in (autocast's).
    Raises ValueError for a named ``backend`` that cannot do the call.
    """
    device = torch.device(device).type
    call = Call(mask, device, dtype, queries, keys, head_dim, value_dim or head_dim, softcap)
    return _choose(call) if backend == "auto" else (_checked(backend, call), "chosen by name")


def prepare_mask(
    mask: AttentionMask, backend: str, *, queries: int, keys: int, device: torch.device | str
) -> AttentionMask:
    """The mask on ``device`` with all that ``backend`` would otherwise recompute in every layer.

    Call it once a batch (and once for each window) outside the compiled model, with choose_backend's answer.
    """
    if mask.documents is not None and mask.packing is None:
        mask = replace(mask, packing=mask.boundaries())
    mask = mask.to(device)
    if backend == "flex":
        mask = replace(mask, blocks=backends.flex_blocks(mask, queries, keys, torch.device(device)))
    return mask


def _choose(call: Call) -> tuple[str, str]:
    if call.device == "cuda":
        return _choose_cuda(call)
    if call.device == "cpu":
        return _choose_cpu(call)
    if call.softcap is not None:
        return "matmul", "softcap, which sdpa lacks"
    return "sdpa", f"the general one for {call.device}"


def _choose_cpu(call: Call) -> tuple[str, str]:
    mask, S = call.mask, call.queries
    if call.softcap is not None:
        return "matmul", "softcap, which sdpa lacks"
    sparse = mask.documents is not None or mask.window is not None
    rival = "document" if sparse and _document_obstacle(call) is None else "sdpa"
    limit = (CPU_MATMUL_SPARSE if rival == "document" else CPU_MATMUL_DENSE).get(call.dtype, 0)
    if call.queries <= limit:
        return "matmul", f"CPU, {S} queries: up to {limit} it beats {rival}"
    return rival, f"CPU, {S} queries: over {limit} it beats matmul in time or memory"


def _choose_cuda(call: Call) -> tuple[str, str]:
    mask = call.mask
    if _flash_obstacle(call) is None:
        return "flash", "flash-attn is installed and can"
    plain = (mask.is_full or mask.is_plain_causal) and call.softcap is None
    if plain and (call.queries == call.keys or mask.is_full or call.queries == 1):
        return "sdpa", "no mask beyond causal: its own flash kernel"
    if _varlen_obstacle(call) is None:
        return "varlen", "documents or a window without a dense mask; flash-attn cannot or is not installed"
    if call.queries == call.keys:
        return "flex", "a mask or dtype that the flash kernels lack"
    if call.softcap is not None:
        return "matmul", "softcap with a key-value cache"
    return "sdpa", "a key-value cache under a mask: dense, but a row or few"


def _checked(name: str, call: Call) -> str:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown: must be auto, {', '.join(BACKENDS)}")
    obstacle = BACKENDS[name].obstacle(call)
    if obstacle is not None:
        able = [other for other, entry in BACKENDS.items() if entry.obstacle(call) is None]
        raise ValueError(f"attention backend {name!r} {obstacle}: use auto or one of {', '.join(able)}")
    return name


def _check_shapes(q: Tensor, k: Tensor, mask: AttentionMask) -> None:
    (B, S, H, _), (_, T, K, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"attention has {H} query heads and {K} key-value heads: must be a multiple")
    if S > T and not mask.is_full:
        raise ValueError(f"attention has {S} queries and {T} keys: only an all-seeing mask allows S > T")
    wanted = {"documents": (B, T), "spans": (B, T), "prefix": (B,)}
    for name, expected in wanted.items():
        rows = getattr(mask, name)
        if rows is not None and rows.shape != expected:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}: must be {expected} for this batch")

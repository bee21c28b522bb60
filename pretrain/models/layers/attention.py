"""The attention core: one function over a declarative mask, several back ends, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.layers import attention_backends as backends
from pretrain.models.layers.attention_mask import AttentionMask

__all__ = ["BACKENDS", "AttentionMask", "attention", "choose_backend"]


@dataclass(frozen=True)
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
    """One back end: the function, and what it cannot do (None when it can do the call)."""

    run: Callable[..., Tensor]
    cannot: Callable[[Call], str | None]


def _sdpa_cannot(call: Call) -> str | None:
    return "has no softcap" if call.softcap is not None else None


def _nothing(call: Call) -> str | None:
    return None


BACKENDS = {
    "sdpa": Backend(backends.sdpa, _sdpa_cannot),
    "matmul": Backend(backends.matmul, _nothing),
    "reference": Backend(backends.reference, _nothing),
}


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
) -> tuple[str, str]:
    """The back end that ``attention(..., backend="auto")`` takes for such a call, and why, for one log line.

    ``queries`` and ``keys`` are sequence lengths S and T in tokens, ``dtype`` the one computed in (that of autocast).
    """
    call = Call(
        mask, torch.device(device).type, dtype, queries, keys, head_dim, value_dim or head_dim, softcap
    )
    return _choose(call)


def _choose(call: Call) -> tuple[str, str]:
    if call.softcap is not None:
        return "matmul", "softcap, which sdpa lacks"
    if call.device == "cpu" and call.queries <= 1024:
        return "matmul", "CPU at a short sequence"
    return "sdpa", "the default"


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
    """Softmax attention of ``q`` [B, S, H, D] over ``k`` [B, T, K, D] and ``v`` [B, T, K, V], giving [B, S, H, V].

    H must be a multiple of K (grouped queries: heads g * H/K to (g + 1) * H/K - 1 share key-value head g). With T > S
    the queries are the last S positions. ``scale`` defaults to D ** -0.5; ``softcap`` c replaces each score s by
    c * tanh(s / c). Under autocast the inputs are cast to its dtype. Rows of padding (negative document ids) are 0.
    Raises ValueError for shapes that do not fit and for a named ``backend`` that cannot do the call.
    """
    _check_shapes(q, k, v, mask)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    S, T = q.shape[1], k.shape[1]
    call = Call(mask, device, q.dtype, S, T, q.shape[3], v.shape[3], softcap)
    name = _choose(call)[0] if backend == "auto" else backend
    if backend != "auto":
        _check_backend(name, call)
    out = BACKENDS[name].run(q, k, v, mask, q.shape[3] ** -0.5 if scale is None else scale, softcap)
    if mask.documents is not None and (mask.packing is None or mask.packing.has_padding):
        out = out.masked_fill((mask.documents[:, T - S :] < 0)[:, :, None, None], 0.0)
    return out


def _check_backend(name: str, call: Call) -> None:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown: one of auto, {', '.join(BACKENDS)}")
    obstacle = BACKENDS[name].cannot(call)
    if obstacle is not None:
        able = [other for other, entry in BACKENDS.items() if entry.cannot(call) is None]
        raise ValueError(f"attention backend {name!r} {obstacle}: use auto or one of {', '.join(able)}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    S, H, T, K = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if H % K:
        raise ValueError(f"attention has {H} query heads over {K} key-value heads: must be a multiple")
    if S > T and not mask.is_full:
        raise ValueError(
            f"attention has {S} queries over {T} keys: only a full (bidirectional) mask allows more"
        )
    if mask.documents is not None and mask.documents.shape[1] != T:
        raise ValueError(
            f"documents has {mask.documents.shape[1]} positions but there are {T} keys: must be equal"
        )

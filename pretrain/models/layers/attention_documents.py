"""CPU attention over packed documents: torch's CPU flash kernel, called once a document instead of under a dense
mask, so the cost is the sum of squared lengths. A sliding window is cut into blocks in the same way.

It is a registered operator with its own backward, so that torch.compile sees one opaque node and no loop.
Shape letters: N tokens of all rows end to end, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.models.layers.attention_mask import AttentionMask

# Queries in one call of the kernel under a window: large enough to amortise the call, small enough to skip keys.
WINDOW_BLOCK = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H, D]; without documents each row is one."""
    B, S, H, D = q.shape
    if mask.documents is not None:
        bounds = mask.boundaries().cu_seqlens
    else:
        bounds = torch.arange(0, (B + 1) * S, S, dtype=torch.int32)
    q, k, v = q.reshape(B * S, H, D), k.reshape(B * S, -1, D), v.reshape(B * S, -1, D)
    out, _ = _documents(q, k, v, bounds, mask.causal, mask.window or 0, scale)
    return out.view(B, S, H, D)


@torch.library.custom_op("pretrain::document_attention", mutates_args=())
def _documents(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=_wide(q))
    for rows, keys, is_causal, bias in _pieces(bounds, causal, window, q.dtype):
        part, part_lse = _forward(
            _heads(q, rows), _heads(k, keys), _heads(v, keys), 0.0, is_causal, attn_mask=bias, scale=scale
        )
        out[rows] = part[0].transpose(0, 1)
        lse[rows] = part_lse[0].transpose(0, 1)
    return out, lse


@_documents.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_wide(q))


@torch.library.custom_op("pretrain::document_attention_backward", mutates_args=())
def _documents_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, keys, is_causal, bias in _pieces(bounds, causal, window, q.dtype):
        parts = _backward(
            _heads(grad, rows),
            _heads(q, rows),
            _heads(k, keys),
            _heads(v, keys),
            _heads(out, rows),
            lse[rows].transpose(0, 1)[None],
            0.0,
            is_causal,
            attn_mask=bias,
            scale=scale,
        )
        grad_q[rows] = parts[0][0].transpose(0, 1)
        grad_k[keys] += parts[1][0].transpose(0, 1)
        grad_v[keys] += parts[2][0].transpose(0, 1)
    return grad_q, grad_k, grad_v


@_documents_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, bounds, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _differentiate(ctx, grad: Tensor, _: Tensor | None):
    q, k, v, out, lse, bounds = ctx.saved_tensors
    grads = _documents_backward(grad, q, k, v, out, lse, bounds, ctx.causal, ctx.window, ctx.scale)
    return *grads, None, None, None, None


_documents.register_autograd(_differentiate, setup_context=_save)


def _wide(q: Tensor) -> torch.dtype:
    """Of the log-sum-exp that the kernel gives for such queries."""
    return torch.promote_types(q.dtype, torch.float32)


def _heads(x: Tensor, rows: slice) -> Tensor:
    """Tokens [N, H, D] -> the kernel's [1, H, n, D], a view."""
    return x[rows].transpose(0, 1)[None]


def _pieces(
    bounds: Tensor, causal: bool, window: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """(queries, keys, causal, additive bias) of each kernel call; every query lies in exactly one."""
    edges = bounds.tolist()
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        if not window or stop - start <= window:
            yield slice(start, stop), slice(start, stop), causal, None
            continue
        for first in range(start, stop, WINDOW_BLOCK):
            last = min(first + WINDOW_BLOCK, stop)
            low = max(first - window + 1, start)
            high = last if causal else min(last + window - 1, stop)
            distance = torch.arange(first, last)[:, None] - torch.arange(low, high)
            hidden = (distance >= window) | ((distance < 0) if causal else (distance <= -window))
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            yield slice(first, last), slice(low, high), False, bias[None, None]

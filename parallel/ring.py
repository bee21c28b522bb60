"""Ring attention: queries stay, keys and values travel from process to process while attention is computed.

    step t of rank r, which holds the keys and values of rank r - t:

      send them to r + 1, receive those of r - t - 1  ┐ at the same time
      attend to them, merge into (out, lse)           ┘
      backward only: add own part to the gradients that come from r - 1 with them, send the sum on to r + 1

Partial outputs are merged exactly by their log-sum-exp; the gradients of keys and values arrive at home after cp steps.
It is a registered operator with its own backward, so that torch.compile sees one opaque node.
Source: Liu et al. 2023 (arXiv:2310.01889). Shape letters: B batch, S this process's part of the sequence, N = B * S,
H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.weak import WeakTensorKeyDictionary

from parallel.ring_kernels import KERNELS
from parallel.ring_plan import Mask, Plan, ring_plan

# What each tensor of document bounds holds: all layers share one, and reading it may mean to wait for the device.
_edges: Any = WeakTensorKeyDictionary()


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *, causal: bool, window: int | None, scale: float, group: str
) -> Tensor:
    """q [B, S, H, D], k and v [B, S, K, D], in zig-zag order -> [B, S, H, D].

    bounds: cumulative token counts of the documents of all whole rows end to end, as varlen kernels take them; may be
    padded with its last value. window: in tokens, CPU only. group: name of the process group of cp ranks.
    """
    return _ring(q, k, v, bounds, causal, window or 0, scale, group)[0]


@torch.library.custom_op("pretrain::ring_attention", mutates_args=())
def _ring(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, window: int, scale: float, group: str
) -> tuple[Tensor, Tensor]:
    ring = _resolve_process_group(cast(Any, group))
    kernel = KERNELS[q.device.type]
    mask, plan = _planned(q, bounds, causal, window, ring)
    shape, q, kv = q.shape, _tokens(q), torch.stack((k, v)).flatten(1, 2)
    out = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=_wide(q), device=q.device)
    for step, pieces in enumerate(plan):
        incoming = _Shift(kv, ring) if step + 1 < len(plan) else None
        for piece in pieces:
            rows, keys = piece.queries, piece.keys
            part = kernel.forward(q[rows], kv[0, keys], kv[1, keys], piece, mask, scale)
            _merge(out[rows], lse[rows], *part)
        if incoming is not None:
            kv = incoming.wait()
    return out.to(q.dtype).view(shape), lse


@_ring.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, window: int, scale: float, group: str
) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B * S, H), dtype=_wide(q))


@torch.library.custom_op("pretrain::ring_attention_backward", mutates_args=())
def _ring_backward(
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
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _resolve_process_group(cast(Any, group))
    kernel = KERNELS[q.device.type]
    mask, plan = _planned(q, bounds, causal, window, ring)
    q_shape, k_shape = q.shape, k.shape
    grad, q, out = (_tokens(x) for x in (grad, q, out))
    kv = torch.stack((k, v)).flatten(1, 2)
    grad_q = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
    travelling: _Shift | None = None
    for step, pieces in enumerate(plan):
        incoming = _Shift(kv, ring) if step + 1 < len(plan) else None
        grad_kv = torch.zeros(kv.shape, dtype=_wide(kv), device=kv.device)
        for piece in pieces:
            rows, keys = piece.queries, piece.keys
            parts = kernel.backward(
                grad[rows], q[rows], kv[0, keys], kv[1, keys], out[rows], lse[rows], piece, mask, scale
            )
            grad_q[rows] += parts[0]
            grad_kv[0, keys] += parts[1]
            grad_kv[1, keys] += parts[2]
        if travelling is not None:
            grad_kv += travelling.wait()
        travelling = _Shift(grad_kv, ring)
        if incoming is not None:
            kv = incoming.wait()
    assert travelling is not None
    grad_k, grad_v = travelling.wait().to(k.dtype).view(2, *k_shape).unbind()
    return grad_q.to(q.dtype).view(q_shape), grad_k.clone(), grad_v.clone()


@_ring_backward.register_fake
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
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, bounds, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _differentiate(ctx, grad: Tensor, _: Tensor | None):
    return *_ring_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_ring.register_autograd(_differentiate, setup_context=_save)


class _Shift:
    """A tensor on its way to the next rank of the ring, while the previous rank's is on its way here."""

    def __init__(self, tensor: Tensor, ring: dist.ProcessGroup):
        self.sent, self.received = tensor, torch.empty_like(tensor)
        rank, cp = ring.rank(), ring.size()
        send = dist.P2POp(dist.isend, tensor, group=ring, group_peer=(rank + 1) % cp)
        receive = dist.P2POp(dist.irecv, self.received, group=ring, group_peer=(rank - 1) % cp)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Attention over more keys from attention over some [n, H, D] and over others, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_()[..., None]).add_(part * (part_lse - total).exp_()[..., None])
    lse.copy_(total)


def _planned(q: Tensor, bounds: Tensor, causal: bool, window: int, ring: dist.ProcessGroup) -> tuple[Mask, Plan]:
    B, S = q.shape[:2]
    rank, cp = ring.rank(), ring.size()
    edges = _edges.get(bounds)
    if edges is None:
        edges = _edges[bounds] = tuple(sorted(set(bounds.tolist())))
    mask = Mask(edges, B, S * cp, causal, window or None)
    return mask, ring_plan(mask, rank, cp, varlen=KERNELS[q.device.type].varlen)


def _tokens(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [N, H, D] with adjacent elements of a head, as the kernels want; a gradient may be expanded."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    """What partial results are summed in, and the log-sum-exp that the kernels give for such queries."""
    return torch.promote_types(x.dtype, torch.float32)

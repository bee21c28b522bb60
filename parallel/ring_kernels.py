"""The attention kernels under ring attention: they give the log-sum-exp with the output, and take both in backward.

Shape letters: N tokens of all rows end to end (n queries, m keys of a piece), H query heads, K key-value heads, D head
size. A kernel's backward computes exp(score - lse) and needs the final output of a query only for its row sum with the
gradient. So called with the output and log-sum-exp over all keys it gives the exact gradient through some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from parallel.ring_plan import Mask, Piece

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Kernel:
    """forward(q [n, H, D], k [m, K, D], v, piece, mask, scale) -> out [n, H, D], lse [n, H] in fp32 or wider.

    backward(grad, q, k, v, out, lse, piece, mask, scale) -> gradients of q, k, v.
    varlen: one call takes many documents.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    varlen: bool


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    bias = _bias(piece, mask, q.dtype)
    causal = piece.causal and bias is None
    out, lse = _cpu(_heads(q), _heads(k), _heads(v), 0.0, causal, attn_mask=bias, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    bias = _bias(piece, mask, q.dtype)
    causal = piece.causal and bias is None
    tensors = [_heads(x) for x in (grad, q, k, v, out)]
    grads = _cpu_backward(*tensors, lse.transpose(0, 1)[None], 0.0, causal, attn_mask=bias, scale=scale)
    grad_q, grad_k, grad_v = (x[0].transpose(0, 1) for x in grads)
    return grad_q, grad_k, grad_v


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _cuda(q, k, v, *_lengths(q, k, piece), 0.0, piece.causal, False, scale=scale)
    return out, lse.transpose(0, 1)


def cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.transpose(0, 1).contiguous()
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    lengths = _lengths(q, k, piece)
    return _cuda_backward(grad, q, k, v, out, lse, *lengths, 0.0, piece.causal, *no_dropout, scale=scale)


# The CUDA kernels are called as torch.nn.attention.varlen calls them (torch 2.11 to 2.13).
KERNELS = {
    "cpu": Kernel(cpu_forward, cpu_backward, varlen=False),
    "cuda": Kernel(cuda_forward, cuda_backward, varlen=True),
}


def _heads(x: Tensor) -> Tensor:
    """Tokens [n, H, D] -> the CPU kernel's [1, H, n, D], a view."""
    return x.transpose(0, 1)[None]


def _bias(piece: Piece, mask: Mask, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, n, m], 0 where the query sees the key and -inf where not; None: it sees all, but for `piece.causal`."""
    if piece.band is None or mask.window is None:
        return None
    n, m = (part.stop - part.start for part in (piece.queries, piece.keys))
    distance = torch.arange(piece.band, piece.band + n)[:, None] - torch.arange(m)
    hidden = (distance >= mask.window) | ((distance < 0) if mask.causal else (distance <= -mask.window))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _lengths(q: Tensor, k: Tensor, piece: Piece) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens of queries and keys, and the longest of each."""
    if piece.documents:
        edges = piece.documents
        longest = max(b - a for a, b in pairwise(edges))
        return _on_device(edges, q.device), _on_device(edges, q.device), longest, longest
    n, m = q.shape[0], k.shape[0]
    return _on_device((0, n), q.device), _on_device((0, m), q.device), n, m


@lru_cache(maxsize=1024)
def _on_device(edges: tuple[int, ...], device: torch.device) -> Tensor:
    """int32; copied from pinned memory once for all layers, as a plain copy would wait for the device in each."""
    return torch.tensor(edges, dtype=torch.int32).pin_memory().to(device, non_blocking=True)

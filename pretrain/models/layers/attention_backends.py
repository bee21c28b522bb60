"""The attention back ends: each computes the same function of q, k, v and an AttentionMask.

Shape letters: B batch, S queries, T keys, H query heads, K key-value heads, G = H / K, D and V head sizes.
Every function here takes q [B, S, H, D], k [B, T, K, D], v [B, T, K, V] and returns [B, S, H, V]. Rows of padding
are zeroed by the caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers.attention_mask import AttentionMask, visible


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    """Dense mask, fp64 accumulation: slow, and what the others are tested against."""
    S, T, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(G, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(mask, range(S), range(T), max(T - S, 0), q.device)[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhst,bthd->bshd", weights, v).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """torch's scaled_dot_product_attention; anything but full or plain causal is a dense boolean mask there."""
    S, T = q.shape[1], k.shape[1]
    plain_causal = mask.is_plain_causal and S == T
    full = mask.is_full or (mask.is_plain_causal and S == 1)
    seen = (
        None if full or plain_causal else visible(mask, range(S), range(T), max(T - S, 0), q.device)[:, None]
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=plain_causal and S > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def matmul(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    """Two batched matrix products with the query heads of a group side by side; the compiler fuses what is between."""
    B, S, H, D = q.shape
    T, K, V = k.shape[1], k.shape[2], v.shape[3]
    G = H // K
    grouped = q.view(B, S, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * S, D)
    scores = (grouped @ k.permute(0, 2, 3, 1)).view(B, K, G, S, T).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if not mask.is_full:
        seen = visible(mask, range(S), range(T), max(T - S, 0), q.device)[:, None, None]
        scores = torch.where(seen, scores, float("-inf"))
    weights = scores.softmax(dim=-1).to(v.dtype).view(B, K, G * S, T)
    out = (weights @ v.transpose(1, 2)).view(B, K, G, S, V)
    return out.permute(0, 3, 1, 2, 4).reshape(B, S, H, V)

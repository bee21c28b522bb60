"""The attention back ends: each computes the same function of q, k, v and an AttentionMask.

Shape letters: B batch, S queries, T keys, H query heads, K key-value heads, G = H / K, D and V head sizes.
Every function takes q [B, S, H, D], k [B, T, K, D], v [B, T, K, V] and gives [B, S, H, V]. The caller checks
that the back end can do the call, and zeroes rows of padding.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from pretrain.models.layers.attention_mask import AttentionMask, visible

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

# matmul cuts the queries into blocks, so that a causal mask's upper triangle is skipped: of 256 queries or more, in
# at most 4 parts, as each adds about 2 s to a cold compile. Forward and backward in bf16, 2 threads: at sequence 512
# one part 27 ms, two 20, four 22; at 1024 one 51 ms, two 43, four 40; sdpa 55 and 67.
MATMUL_BLOCK = 256
MATMUL_PARTS = 4


def reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """Dense mask, fp64 accumulation: slow, and what the others are tested against."""
    S, T, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(G, dim=2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):  # else the products would be rounded
        scores = torch.einsum("bshd,bthd->bhst", q.double(), k) * scale
        if softcap is not None:
            scores = cap(scores, softcap)
        seen = visible(mask, range(S), range(T), max(T - S, 0), q.device)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhst,bthd->bshd", weights, v).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """torch's scaled_dot_product_attention; beyond full and plain causal it needs a dense boolean mask."""
    S, T = q.shape[1], k.shape[1]
    plain_causal = mask.is_plain_causal and S == T
    seen = None
    if not (mask.is_full or plain_causal or (mask.is_plain_causal and S == 1)):
        seen = visible(mask, range(S), range(T), max(T - S, 0), q.device)[:, None]
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


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """Batched products with the query heads of a group side by side; the compiler fuses mask and softmax."""
    B, S, H, D = q.shape
    T, K, V = k.shape[1], k.shape[2], v.shape[3]
    G, offset = H // K, max(T - S, 0)
    grouped = q.reshape(B, S, K, G, D).permute(0, 2, 3, 1, 4)
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    step = max(MATMUL_BLOCK, -(-S // MATMUL_PARTS))
    parts = []
    for start in range(0, S, step):
        rows = range(start, min(start + step, S))
        cols = _columns(mask, rows, T, offset)
        n, m = len(rows), len(cols)
        scores = grouped[:, :, :, rows.start : rows.stop].reshape(B, K, G * n, D) @ keys[..., cols.start : cols.stop]
        scores = scores.view(B, K, G, n, m).to(torch.promote_types(q.dtype, torch.float32)) * scale
        if softcap is not None:
            scores = cap(scores, softcap)
        if not mask.is_full:
            # An added bias ran the forward in 7.4 ms where a select on the scores ran it in 11.
            seen = visible(mask, rows, cols, offset, q.device)[:, None, None]
            scores = scores + torch.where(seen, 0.0, float("-inf"))
        weights = scores.softmax(dim=-1).to(v.dtype).view(B, K, G * n, m)
        parts.append((weights @ values[:, :, cols.start : cols.stop]).view(B, K, G, n, V))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
    return out.permute(0, 3, 1, 2, 4).reshape(B, S, H, V)


def cap(scores: Tensor, softcap: float) -> Tensor:
    """Squash scores into (-softcap, softcap), as Gemma 2 does."""
    return softcap * torch.tanh(scores / softcap)


def _columns(mask: AttentionMask, rows: range, T: int, offset: int) -> range:
    """The keys that a block of queries may see, as far as positions alone tell."""
    if mask.prefix is not None or mask.spans is not None:
        return range(T)
    low, high = 0, T
    if mask.causal:
        high = min(rows.stop + offset, T)
    if mask.window is not None:
        low = max(rows.start + offset - mask.window + 1, 0)
        high = min(high, rows.stop + offset + mask.window - 1)
    return range(low, high)


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """torch's variable-length flash kernel (CUDA): documents end to end, or one document a row."""
    B, S, H, D = q.shape
    T, K = k.shape[1], k.shape[2]
    if mask.documents is not None:
        packing = mask.boundaries()
        starts_q = starts_k = packing.cu_seqlens
        longest_q = longest_k = packing.max_length
    else:
        starts_q, starts_k = (
            torch.arange(0, (B + 1) * length, length, dtype=torch.int32, device=q.device) for length in (S, T)
        )
        longest_q, longest_k = S, T
    options: dict[str, Any] = {"enable_gqa": H != K} if VARLEN_HAS_GQA else {}
    if H != K and not VARLEN_HAS_GQA:
        k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
    q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    out = varlen_attn(
        q,
        k,
        v,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=_flash_window(mask),
        **options,
    )
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out.view(B, S, H, D)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """The flash-attn package (CUDA), https://github.com/Dao-AILab/flash-attention."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    B, S, H, D = q.shape
    options = {
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": _flash_window(mask),
        "softcap": softcap or 0.0,
    }
    if mask.documents is None:
        return flash_attn_func(q, k, v, **options)
    packing = mask.boundaries()
    starts, longest = packing.cu_seqlens, packing.max_length
    q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options).view(B, S, H, D)


def _flash_window(mask: AttentionMask) -> tuple[int, int]:
    """(keys to the left, keys to the right) beside the query's own; -1: no limit."""
    side = -1 if mask.window is None else mask.window - 1
    return side, 0 if mask.causal else side


def flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """FlexAttention (CUDA): any mask, skipping the blocks nobody sees."""
    S, T = q.shape[1], k.shape[1]
    blocks = mask.blocks if isinstance(mask.blocks, BlockMask) else flex_blocks(mask, S, T, q.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else cap(score, softcap)

    # Uncompiled, FlexAttention falls back to a dense computation; inside a compiled model it is compiled with it.
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out = run(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex_blocks(mask: AttentionMask, S: int, T: int, device: torch.device) -> BlockMask:
    """FlexAttention's block mask for S queries at the end of T positions."""
    offset = max(T - S, 0)
    causal, window, prefix, documents, spans = mask.causal, mask.window, mask.prefix, mask.documents, mask.spans

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i = i + offset
        seen = (j <= i) if causal else (j >= 0)
        if window is not None:
            seen = seen & (i - j < window) & (j - i < window)
        if prefix is not None:
            seen = seen | ((i < prefix[b]) & (j < prefix[b]))
        if spans is not None:
            seen = seen | ((spans[b, i] == spans[b, j]) & (spans[b, i] >= 0))
        if documents is not None:
            seen = seen & (documents[b, i] == documents[b, j])
        return seen

    per_row = next((x.shape[0] for x in (prefix, documents, spans) if x is not None), None)
    return create_block_mask(sees, per_row, None, S, T, device=device)

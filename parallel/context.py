"""Context parallelism: processes that share a sequence, between which attention alone communicates.

    ulysses   [B, S/cp, H, D] -> all-to-all -> [B, S, H/cp, D] -> the core's own kernels -> all-to-all -> back
    ring      queries stay, keys and values travel; zig-zag parts of the sequence balance a causal mask

Sources: Jacobs et al. 2023 (arXiv:2309.14509), Liu et al. 2023 (arXiv:2310.01889).
Shape letters: B batch, S sequence, H query heads, K key-value heads, D and V head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from parallel.ring import ring_attention
from parallel.ring_plan import chunks_of

Method = Literal["ulysses", "ring"]


def split_sequence(tensor: Tensor, dim: int, rank: int, cp: int, method: Method) -> Tensor:
    """The part of `rank` of the whole sequence along `dim`: for ulysses 1 of `cp` chunks, for ring 2 of 2 * `cp`."""
    parts = cp if method == "ulysses" else 2 * cp
    assert tensor.shape[dim] % parts == 0, f"{tensor.shape[dim]} tokens in {parts} parts"
    chunks = tensor.chunk(parts, dim)
    if method == "ulysses":
        return chunks[rank]
    return torch.cat([chunks[index] for index in chunks_of(rank, cp)], dim)


def check_context(seq_len: int, cp: int, method: Method, heads: int, tp: int = 1) -> None:
    """Raises ValueError when `cp` processes cannot share `seq_len` tokens, or the query heads that `tp` leaves them."""
    if cp == 1:
        return
    multiple = cp * (math.lcm(2, tp) if method == "ring" else tp)
    if seq_len % multiple:
        near = max(round(seq_len / multiple), 1) * multiple
        raise ValueError(
            f"data.seq_len = {seq_len} is not a multiple of {multiple}, which parallel.cp = {cp} ({method}) with "
            f"parallel.tp = {tp} needs; set it to {near}, for instance"
        )
    local = heads // tp
    if method == "ulysses" and local % cp:
        legal = [degree for degree in range(1, local + 1) if local % degree == 0]
        raise ValueError(
            f"parallel.cp = {cp} (ulysses) does not divide the {local} query heads that parallel.tp = {tp} leaves each "
            f'process; set it to one of {legal}, or parallel.cp_method = "ring"'
        )


def apply_context(core: nn.Module, mesh: DeviceMesh, method: Method) -> None:
    """Make an attention core work on this process's part of the sequence, in place.

    core: `forward(q [B, S, H, D], k [B, S, K, D], v [B, S, K, V], mask) -> [B, S, H, V]` with attributes `scale` and
    `softcap`, each a float or None. Afterwards S is S/cp; the mask stays that of the whole sequence. mesh: axis cp.
    Raises ValueError for a softcap with ring. Masks that ring cannot do raise at the first call.
    """
    cp, group = mesh.size(), mesh.get_group().group_name
    if cp == 1:
        return
    if method == "ulysses":
        core.forward = _ulysses(core.forward, group, cp)
    elif getattr(core, "softcap", None) is not None:
        raise ValueError(_refusal("a softcap on attention scores"))
    else:
        core.forward = _ring(core, group, mesh.get_local_rank(), cp)


def _ulysses(attend: Callable[..., Tensor], group: Any, cp: int) -> Callable[..., Tensor]:
    def exchange(x: Tensor) -> Tensor:
        """x [cp, ...]: part i goes to rank i; the result's part i comes from rank i."""
        return all_to_all_single_autograd(x.contiguous(), None, None, group)

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        q, k, v = _computed_in(q, k, v)
        k, v = (_enough_heads(x, cp) for x in (k, v))
        S = q.shape[1]
        by_rank = [x.unflatten(2, (cp, -1)).flatten(3).movedim(2, 0) for x in (q, k, v)]  # [cp, B, S/cp, H/cp * D]
        mine = exchange(torch.cat(by_rank, dim=-1)).movedim(0, 1).flatten(1, 2)  # one message for all three
        parts = mine.split([x.shape[-1] for x in by_rank], dim=-1)
        heads = [part.unflatten(-1, (-1, x.shape[-1])) for part, x in zip(parts, (q, k, v), strict=True)]
        out = attend(*heads, mask)
        return exchange(out.unflatten(1, (cp, S)).movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    return forward


def _enough_heads(x: Tensor, cp: int) -> Tensor:
    """Key-value heads [B, S, K, D] repeated as few times as make them a multiple of `cp`; gradients sum by themselves.

    cp divides the query heads, so that the repeats too divide the query heads of each.
    """
    repeats = cp // math.gcd(cp, x.shape[2])
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)


def _ring(core: Any, group: str, rank: int, cp: int) -> Callable[..., Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        q, k, v = _computed_in(q, k, v)
        _check_ring(q, mask, cp)
        B, S, _, D = q.shape
        V = v.shape[-1]
        q, k, v = (_widen(x, max(D, V)) for x in (q, k, v))
        if mask.documents is None:
            bounds = torch.arange(0, (B + 1) * S * cp, S * cp, dtype=torch.int32)
        else:
            bounds = mask.boundaries().cu_seqlens
        scale = D**-0.5 if core.scale is None else core.scale
        out = ring_attention(q, k, v, bounds, causal=mask.causal, window=mask.window, scale=float(scale), group=group)
        out = out[..., :V]
        if mask.documents is not None and (mask.packing is None or mask.packing.has_padding):
            padding = split_sequence(mask.documents, 1, rank, cp, "ring") < 0
            out = out.masked_fill(padding[:, :, None, None], 0.0)
        return out

    return forward


def _widen(x: Tensor, width: int) -> Tensor:
    """Zeros beside the dims of each head, which change neither scores nor values: the kernels have one width."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _check_ring(q: Tensor, mask: Any, cp: int) -> None:
    B, S = q.shape[:2]
    if mask.prefix is not None:
        raise ValueError(_refusal("a prefix mask"))
    if mask.spans is not None:
        raise ValueError(_refusal("spans that see each other both ways"))
    if q.device.type == "cuda" and mask.window is not None:
        raise ValueError(_refusal("a sliding window on a GPU"))
    if q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(_refusal(f"{str(q.dtype).removeprefix('torch.')} on a GPU"))
    if S % 2:
        raise ValueError(
            f"ring attention got {S} tokens a process: must be even; make data.seq_len a multiple of {2 * cp}"
        )
    if mask.documents is not None and mask.documents.shape != (B, S * cp):
        raise ValueError(
            f"ring attention got documents of shape {list(mask.documents.shape)}: must be {[B, S * cp]}, those of the "
            "whole sequence; do not split the mask over parallel.cp"
        )


def _refusal(what: str) -> str:
    return f'parallel.cp_method = "ring" cannot do {what}; set parallel.cp_method = "ulysses"'


def _computed_in(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype, as attention does itself: fewer bytes travel."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)

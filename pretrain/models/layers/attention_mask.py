"""Who may attend to whom, said declaratively: one record that every attention back end understands.

Shape letters: B batch, S queries, T keys, N documents in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the documents of a batch begin, laid end to end over all B rows: what variable-length kernels take.

    ``cu_seqlens`` is padded with its last value to a power of two, and ``max_length`` rounded up to one, so that a
    compiled step sees few distinct shapes. Zero-length documents cost nothing in any kernel.
    """

    cu_seqlens: Tensor  # [>= N + 1] int32, cumulative token counts, first 0, last B * S
    max_length: int  # at least the length in tokens of the longest document
    has_padding: bool  # whether any token carries a negative document id


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query sees. The defaults are a plain causal mask.

    With T > S (a key-value cache) the queries are the last S of the T positions. A row of ``documents`` then has T
    entries. Build a batch's mask once with :meth:`packed` when there are documents; layers derive theirs with
    :meth:`with_window`, which shares the precomputed data.
    """

    causal: bool = True
    window: int | None = None  # keys in (i - window, i] if causal, else |i - j| < window; None: all
    prefix: Tensor | None = (
        None  # [B] int; the first prefix[b] positions see each other both ways, window or not
    )
    documents: Tensor | None = (
        None  # [B, T] int; only equal ids see each other; negative: padding, which gives 0
    )
    packing: Packing | None = None  # derived from ``documents`` by :meth:`packed`
    blocks: object | None = None  # FlexAttention's BlockMask, made by ``prepare``

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"attention window is {self.window}: must be 1 or more tokens, or None for no limit"
            )
        if self.prefix is not None and not self.causal:
            raise ValueError(
                "a prefix needs a causal mask: a bidirectional one already sees everything; drop one"
            )
        if self.prefix is not None and self.documents is not None:
            raise ValueError(
                "prefix and documents cannot be combined: put one document in a row, or drop the prefix"
            )

    @classmethod
    def packed(cls, documents: Tensor, *, causal: bool = True, window: int | None = None) -> AttentionMask:
        """A mask for rows of packed documents, with the boundaries precomputed once for all layers.

        Call it on the CPU tensor and move the result with :meth:`to`: reading the boundaries of a CUDA tensor waits
        for the device. ``documents`` is [B, S] int; raises ValueError where an id comes back after another.
        """
        return cls(causal=causal, window=window, documents=documents, packing=find_packing(documents))

    def with_window(self, window: int | None) -> AttentionMask:
        """The same mask with another sliding window, sharing the document data (not the block mask)."""
        return self if window == self.window else replace(self, window=window, blocks=None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionMask:
        """The same mask on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        packing = self.packing
        if packing is not None:
            packing = replace(packing, cu_seqlens=packing.cu_seqlens.to(device, non_blocking=non_blocking))
        return replace(
            self, prefix=move(self.prefix), documents=move(self.documents), packing=packing, blocks=None
        )

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return not self.causal and self.window is None and self.documents is None

    @property
    def is_plain_causal(self) -> bool:
        """Causal and nothing else."""
        return self.causal and self.window is None and self.documents is None and self.prefix is None


def find_packing(documents: Tensor) -> Packing:
    """Read the document boundaries off ``documents`` [B, S]."""
    if documents.dim() != 2:
        raise ValueError(
            f"documents has shape {list(documents.shape)}: must be [batch, sequence] document ids"
        )
    batch, length = documents.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    rows = torch.arange(batch, device=documents.device)[:, None].expand_as(documents)
    named = torch.stack((rows.flatten()[starts], documents.flatten()[starts]))
    if torch.unique(named[:, named[1] >= 0], dim=1).shape[1] != int((named[1] >= 0).sum()):
        raise ValueError(
            "documents holds an id that comes back after another in its row: give each run its own id"
        )
    total = batch * length
    count = starts.numel()
    cu_seqlens = torch.full((_power_of_two(count + 1),), total, dtype=torch.int32, device=documents.device)
    cu_seqlens[:count] = starts
    longest = int(cu_seqlens.diff().max()) if total else 0
    return Packing(cu_seqlens, min(_power_of_two(longest), length), bool((documents < 0).any()))


def visible(mask: AttentionMask, queries: range, keys: range, offset: int, device: torch.device) -> Tensor:
    """Boolean [B or 1, len(queries), len(keys)]: computed from positions, so that a compiler can fuse it.

    ``queries`` are query indices, ``keys`` key positions; query i stands at position i + offset.
    """
    i = torch.arange(queries.start + offset, queries.stop + offset, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    if mask.causal:
        seen = seen & (j <= i)
    if mask.window is not None:
        seen = seen & (i - j < mask.window)
        if not mask.causal:
            seen = seen & (j - i < mask.window)
    seen = seen[None]
    if mask.prefix is not None:
        end = mask.prefix.to(device)[:, None, None]
        seen = seen | ((i < end) & (j < end))
    if mask.documents is not None:
        ids = mask.documents
        of_query = ids[:, queries.start + offset : queries.stop + offset]
        seen = seen & (of_query[:, :, None] == ids[:, None, keys.start : keys.stop])
    return seen.expand(seen.shape[0], len(queries), len(keys))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()

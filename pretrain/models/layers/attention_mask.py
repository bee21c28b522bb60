"""Who may attend to whom, said declaratively: one record that every attention back end understands.

Shape letters: B batch, S queries, T keys, N documents in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the documents of a batch begin, with its B rows laid end to end: what varlen kernels take.

    ``cu_seqlens`` is padded with its last value to a power of two, and ``max_length`` rounded up to one, so
    that a compiled step sees few distinct shapes. Documents of no length cost nothing in any kernel.
    """

    cu_seqlens: Tensor  # [>= N + 1] int32, cumulative token counts: first 0, last B * S
    max_length: int  # tokens; at least the length of the longest document
    has_padding: bool  # whether any token carries a negative document id


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query sees. The defaults are a plain causal mask.

    causal: query i sees keys up to i; False: both ways.
    window: in tokens; keys in (i - window, i] if causal, else |i - j| < window. None: no limit.
    prefix: [B] int; the first prefix[b] positions see each other both ways, whatever the window (prefix LM).
    documents: [B, T] int; contiguous document ids, only equal ids see each other. Negative ids are padding,
        whose outputs are zeros.
    spans: [B, T] int; tokens of one span (of an image, say) see each other both ways, whatever the window. Negative
        ids are no span.
    packing: the document boundaries, precomputed by :meth:`packed`.
    blocks: FlexAttention's block mask, precomputed by ``attention.prepare_mask``.

    With T > S (a key-value cache) the queries are the last S of the T positions. Build a batch's mask once;
    layers derive theirs with :meth:`with_window`, which shares the precomputed document data.
    """

    causal: bool = True
    window: int | None = None
    prefix: Tensor | None = None
    documents: Tensor | None = None
    spans: Tensor | None = None
    packing: Packing | None = None
    blocks: object | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention window is {self.window}: must be 1 or more, or None for no limit")
        if self.prefix is not None and not self.causal:
            raise ValueError("prefix needs causal=True: a bidirectional mask sees all; drop one of the two")
        if self.spans is not None and not self.causal:
            raise ValueError("spans needs causal=True: a bidirectional mask sees all; drop one of the two")
        if self.prefix is not None and self.documents is not None:
            raise ValueError("prefix and documents cannot be combined: put one document in a row, or drop one")

    @classmethod
    def packed(cls, documents: Tensor, *, causal: bool = True, window: int | None = None) -> AttentionMask:
        """A mask for rows of packed documents [B, S], with the boundaries computed once for all layers.

        Call it on the CPU and move the result with :meth:`to`: reading the boundaries of a CUDA tensor waits
        for the device. Raises ValueError where an id comes back after another one in its row.
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
        moved = {name: move(getattr(self, name)) for name in ("prefix", "documents", "spans")}
        return replace(self, **moved, packing=packing, blocks=None)  # type: ignore[arg-type]

    def boundaries(self) -> Packing:
        """The document boundaries; found now, waiting for the device, when not precomputed."""
        assert self.documents is not None
        return self.packing if self.packing is not None else find_packing(self.documents)

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return not self.causal and self.window is None and self.documents is None

    @property
    def is_plain_causal(self) -> bool:
        """Causal and nothing else."""
        others = (self.window, self.documents, self.prefix, self.spans)
        return self.causal and all(other is None for other in others)


def find_packing(documents: Tensor) -> Packing:
    """Read the document boundaries off ``documents`` [B, S]."""
    if documents.dim() != 2:
        raise ValueError(f"documents has shape {list(documents.shape)}: must be [batch, sequence]")
    batch, length = documents.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    rows, columns = first.nonzero(as_tuple=True)
    ids = documents[rows, columns]
    runs = torch.stack((rows, ids))[:, ids >= 0]
    if torch.unique(runs, dim=1).shape[1] != runs.shape[1]:
        raise ValueError("documents has an id that comes back after another in its row: number each run anew")
    count, total = rows.numel(), batch * length
    cu_seqlens = torch.full((_power_of_two(count + 1),), total, dtype=torch.int32, device=documents.device)
    cu_seqlens[:count] = rows * length + columns
    longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, min(_power_of_two(longest), length), bool((documents < 0).any()))


def visible(mask: AttentionMask, queries: range, keys: range, offset: int, device: torch.device) -> Tensor:
    """Boolean [B or 1, len(queries), len(keys)], from positions alone, so that a compiler can fuse it.

    ``queries`` are query indices, ``keys`` key positions; query i stands at position i + offset.
    """
    i = torch.arange(queries.start + offset, queries.stop + offset, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    seen = (j <= i) if mask.causal else (j >= 0).expand(len(queries), len(keys))
    if mask.window is not None:
        seen = seen & (i - j < mask.window) & (j - i < mask.window)
    seen = seen[None]
    if mask.prefix is not None:
        end = mask.prefix[:, None, None]
        seen = seen | ((i < end) & (j < end))
    if mask.spans is not None:
        of_query = mask.spans[:, queries.start + offset : queries.stop + offset, None]
        seen = seen | ((of_query == mask.spans[:, None, keys.start : keys.stop]) & (of_query >= 0))
    if mask.documents is not None:
        of_query = mask.documents[:, queries.start + offset : queries.stop + offset]
        seen = seen & (of_query[:, :, None] == mask.documents[:, None, keys.start : keys.stop])
    return seen


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()

"""Who computes what in ring attention, in whole numbers: no tensor, no process.

The sequence is cut into 2 * cp equal chunks and rank r holds chunks r and 2 * cp - 1 - r, one after the other: under a
causal mask an early chunk sees few keys and a late one many, so that every rank has the same work in every step.
Source: zig-zag order of Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

# Queries in one call of the kernel under a window: large enough to amortise the call, small enough to skip keys.
WINDOW_BLOCK = 256


@dataclass(frozen=True)
class Mask:
    """What the plan needs of a mask over `batch` rows of `length` tokens.

    edges: ascending, the first token of every document with all rows end to end, and batch * length.
    """

    edges: tuple[int, ...]
    batch: int
    length: int
    causal: bool
    window: int | None


@dataclass(frozen=True)
class Piece:
    """Queries of this process that see keys of one process; both as positions in its tokens, all rows end to end.

    causal: the query at i sees the keys up to i, of as many. band: the first query's position in the sequence minus the
    first key's, when the window or the diagonal hides some of the keys from some of the queries. documents: the edges
    of documents that lie in here side by side, each of which sees only itself; (): one.
    """

    queries: slice
    keys: slice
    causal: bool = False
    band: int | None = None
    documents: tuple[int, ...] = ()


# For each step the pieces to compute.
Plan = tuple[tuple[Piece, ...], ...]


def chunks_of(rank: int, cp: int) -> tuple[int, int]:
    """The two chunks of the 2 * cp that `rank` holds, in the order in which it holds them."""
    return rank, 2 * cp - 1 - rank


@lru_cache(maxsize=256)
def ring_plan(mask: Mask, rank: int, cp: int, *, varlen: bool = False) -> Plan:
    """For each step t what the queries of `rank` see of the keys of rank - t, which have arrived by then.

    varlen: the kernel takes many documents in one call. Every query is in some piece of step 0.
    """
    if varlen and mask.window is None:
        own = _inside(mask, rank, cp)
        squares = [Piece(slice(0, own[-1]), slice(0, own[-1]), mask.causal, documents=own)]
    else:
        squares = []
    plan = []
    for step in range(cp):
        pieces = [] if step else squares.copy()
        for row in range(mask.batch):
            for queries in enumerate(chunks_of(rank, cp)):
                for keys in enumerate(chunks_of((rank - step) % cp, cp)):
                    if queries[1] != keys[1]:
                        pieces += _across(mask, row, queries, keys, cp)
                    elif not squares:
                        pieces += _within(mask, row, queries, cp)
        plan.append(tuple(pieces))
    return tuple(plan)


def work(pieces: Sequence[Piece]) -> int:
    """Query-key pairs that are computed."""
    total = 0
    for piece in pieces:
        n, m = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
        sizes = [(b - a, b - a) for a, b in pairwise(piece.documents)] or [(n, m)]
        total += sum(n * (n + 1) // 2 if piece.causal else n * m for n, m in sizes)
    return total


def _inside(mask: Mask, rank: int, cp: int) -> tuple[int, ...]:
    """Edges of the parts of documents that the chunks of `rank` hold, in its own tokens."""
    chunk = mask.length // (2 * cp)
    edges = []
    for row in range(mask.batch):
        for half, index in enumerate(chunks_of(rank, cp)):
            local, start = (2 * row + half) * chunk, row * mask.length + index * chunk
            edges += [local + a - start for a, _ in _documents(mask, start, start + chunk)]
    return (*edges, mask.batch * 2 * chunk)


def _documents(mask: Mask, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each document's part within these tokens."""
    index = bisect_right(mask.edges, start) - 1
    while index + 1 < len(mask.edges) and mask.edges[index] < stop:
        yield max(mask.edges[index], start), min(mask.edges[index + 1], stop)
        index += 1


def _within(mask: Mask, row: int, own: tuple[int, int], cp: int) -> Iterator[Piece]:
    """A chunk's queries on the chunk's own keys. `own`: (which half of the process's tokens, which chunk)."""
    chunk = mask.length // (2 * cp)
    start = row * mask.length + own[1] * chunk
    shift = (2 * row + own[0]) * chunk - start
    for a, b in _documents(mask, start, start + chunk):
        part = slice(a + shift, b + shift)
        yield from _banded(mask, Piece(part, part, mask.causal), 0)


def _across(mask: Mask, row: int, queries: tuple[int, int], keys: tuple[int, int], cp: int) -> Iterator[Piece]:
    """A chunk's queries on another chunk's keys: only the one document that reaches from one into the other matters."""
    if mask.causal and keys[1] > queries[1]:
        return
    chunk, base = mask.length // (2 * cp), row * mask.length
    early, late = sorted((queries[1], keys[1]))
    index = bisect_right(mask.edges, base + late * chunk)
    start, stop = mask.edges[index - 1] - base, mask.edges[index] - base
    seen = {
        early: (max(start - early * chunk, 0), chunk),
        late: (0, min(stop - late * chunk, chunk)),
    }
    if seen[early][0] >= chunk:
        return
    (q0, q1), (k0, k1) = seen[queries[1]], seen[keys[1]]
    q_at, k_at = (2 * row + queries[0]) * chunk, (2 * row + keys[0]) * chunk
    piece = Piece(slice(q_at + q0, q_at + q1), slice(k_at + k0, k_at + k1))
    yield from _banded(mask, piece, (queries[1] - keys[1]) * chunk + q0 - k0)


def _banded(mask: Mask, piece: Piece, distance: int) -> Iterator[Piece]:
    """Cut into blocks of queries, each with the keys its window reaches. `distance`: first query minus first key."""
    window = mask.window
    if window is None:
        yield piece
        return
    q0, k0, n = piece.queries.start, piece.keys.start, piece.queries.stop - piece.queries.start
    m, after = piece.keys.stop - k0, 0 if mask.causal else window - 1
    for i in range(0, n, WINDOW_BLOCK):
        first, last = i + distance, min(i + WINDOW_BLOCK, n) - 1 + distance  # positions, from the first key's
        first, last = max(first, -after), min(last, m - 1 + window - 1)  # the queries that see a key at all
        low, high = max(first - window + 1, 0), min(last + after + 1, m)
        if first <= last:
            rows = slice(q0 + first - distance, q0 + last + 1 - distance)
            yield Piece(rows, slice(k0 + low, k0 + high), band=first - low)

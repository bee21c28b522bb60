"""Which samples share a row: two budgets at once, tokens and patches, from the index alone.

    pool:   the next 1024 samples of the shuffled order
    row:    the oldest of the pool, then again and again the one that brings the row nearest to full

A row is full where its tokens and its patches stand in the ratio of the whole corpus: so rows cost alike, and so do the
ranks that read them, also where one budget is never used up.
"""

from typing import NamedTuple

import numpy as np

WINDOW = 1024  # samples to choose from


class Rows(NamedTuple):
    """Row r holds the samples ``members[first[r] : first[r + 1]]``."""

    members: np.ndarray  # int64 [samples]
    first: np.ndarray  # int64 [rows + 1]


class PackingCost(NamedTuple):
    """How evenly rows are filled. The cost of a row is the number of its tokens and patches.

    max_over_mean: of the ranks' costs in a step, mean over the steps; worst: of the worst step. token_padding,
    patch_padding: share of each budget that is left empty.
    """

    max_over_mean: float
    worst: float
    token_padding: float
    patch_padding: float


def pack_rows(
    tokens: np.ndarray, patches: np.ndarray, order: np.ndarray, *, seq_len: int, budget: int, window: int = WINDOW
) -> Rows:
    """Put samples of ``tokens`` [n] and ``patches`` [n] into rows of at most ``seq_len`` tokens and ``budget`` patches.

    order: int64 [n], the samples as they come. window: samples to choose from. About 7 microseconds a sample.
    """
    assert (tokens <= seq_len).all() and (patches <= budget).all()
    shares = int(tokens.sum()) / seq_len, int(patches.sum()) / budget
    # What a row of the corpus's own mixture holds when its scarcer budget is used up.
    full = [limit * share / max(*shares, 1e-9) for limit, share in zip((seq_len, budget), shares, strict=True)]
    weights = [1 / amount if amount else 0.0 for amount in full]
    pool, taken = order[:window], min(window, len(order))
    members, first = [order[:0]], [0]
    while len(pool):
        own = _fill(tokens[pool], patches[pool], (seq_len, budget), weights)
        members.append(pool[own])
        first.append(first[-1] + len(own))
        more = order[taken : taken + len(own)]
        pool, taken = np.concatenate([np.delete(pool, own), more]), taken + len(more)
    return Rows(np.concatenate(members), np.array(first))


def _fill(tokens: np.ndarray, patches: np.ndarray, limits: tuple[int, int], weights: list[float]) -> list[int]:
    """Places in the pool of one row's samples, the first of the pool among them."""
    own, left = [], list(limits)
    # A row lacks nothing of a budget that no sample needs.
    missing_tokens, missing_patches = (
        (weight > 0) - amounts * weight for amounts, weight in zip((tokens, patches), weights, strict=True)
    )
    used_tokens = used_patches = 0.0
    free, pick = np.ones(len(tokens), bool), 0
    while True:
        own.append(pick)
        free[pick] = False
        left = [left[0] - int(tokens[pick]), left[1] - int(patches[pick])]
        used_tokens, used_patches = used_tokens + tokens[pick] * weights[0], used_patches + patches[pick] * weights[1]
        fits = free & (tokens <= left[0]) & (patches <= left[1])
        if not fits.any():
            return own
        gap = np.maximum(np.abs(missing_tokens - used_tokens), np.abs(missing_patches - used_patches))
        pick = int(np.where(fits, gap, np.inf).argmin())


def packing_cost(tokens: np.ndarray, patches: np.ndarray, *, seq_len: int, budget: int, ranks: int) -> PackingCost:
    """Of steps whose rows hold ``tokens`` and ``patches``, both [steps, rows]; ``ranks`` share a step's rows evenly."""
    costs = (tokens + patches).reshape(len(tokens), ranks, -1).sum(2)
    ratios = costs.max(1) / np.maximum(costs.mean(1), 1)
    padding = 1 - tokens.mean() / seq_len, 1 - patches.mean() / budget
    return PackingCost(float(ratios.mean()), float(ratios.max()), float(padding[0]), float(padding[1]))

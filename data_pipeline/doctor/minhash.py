"""Near duplicates by MinHash: one-permutation sketches of token shingles, and pairs of them by banded hashing.

A sketch has 128 values; the share that two have in common estimates the Jaccard similarity of the documents' sets of
5-token shingles, with a standard deviation of at most 0.045.

Sources: Broder 1997 (shingles and minima); Li, Owen and Zhang 2012 (one permutation, cut into bins); Shrivastava 2017
(bins without a shingle take another's value); Leskovec, Rajaraman and Ullman, ch. 3 (banding).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

WIDTH = 5  # tokens of a shingle
BINS = 128  # values of a sketch
BIN_BITS = 7
BAND = 4  # values of a band: 4 times 16 bits are one number
MIN_TOKENS = 32  # shorter documents have too few shingles to tell
EMPTY = np.uint32(0xFFFFFFFF)
PAIRS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Sketches:
    """documents int64 [n]: which; order uint32 [n]: by what they are sampled; values uint16 [n, BINS]."""

    documents: np.ndarray
    order: np.ndarray
    values: np.ndarray

    def smallest(self, limit: int) -> Self:
        """At most ``limit`` of them, the first by ``order``, in the order of the documents."""
        if len(self.order) <= limit:
            return self
        kept = np.sort(np.argpartition(self.order, limit)[:limit])
        return type(self)(self.documents[kept], self.order[kept], self.values[kept])

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Those of several parts, one after the other."""
        return cls(
            np.concatenate([np.zeros(0, np.int64), *(part.documents for part in parts)]),
            np.concatenate([np.zeros(0, np.uint32), *(part.order for part in parts)]),
            np.concatenate([np.zeros((0, BINS), np.uint16), *(part.values for part in parts)]),
        )


def sketch(tokens: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> Sketches:
    """Sketches of documents that lie one behind the other in ``tokens``; short ones have none.

    Documents are sampled by ``order``, a hash of their smallest shingle: near duplicates mostly share it, so a tenth of
    the documents has about a tenth of the pairs, not a hundredth.

    Args:
        tokens: unsigned [sum of lengths]. lengths: int [documents]. numbers: int [documents], by which the
            sketches tell them.
    """
    long = lengths >= MIN_TOKENS
    documents = np.flatnonzero(long)
    if not len(documents):
        return Sketches(documents, np.zeros(0, np.uint32), np.zeros((0, BINS), np.uint16))
    # Shingles that reach into the next document, and those of short documents, go to a row that is dropped.
    rows = np.full((len(lengths), 2), len(documents), np.int32)
    rows[documents, 0] = np.arange(len(documents))
    inside = np.where(long, lengths - (WIDTH - 1), 0)
    row = np.repeat(rows.ravel(), np.stack([inside, lengths - inside], axis=1).ravel())[: len(tokens) - WIDTH + 1]
    hashes = _shingles(tokens)
    slots = row * BINS + (hashes >> np.uint32(32 - BIN_BITS)).astype(np.int32)
    table = np.full((len(documents) + 1) * BINS, EMPTY)
    np.minimum.at(table, slots, hashes & np.uint32((1 << (32 - BIN_BITS)) - 1))
    table = table.reshape(-1, BINS)[:-1]
    order = _mixed(table.min(axis=1))
    return Sketches(numbers[documents], order, _mixed(_filled(table)).astype(np.uint16))


def _shingles(tokens: np.ndarray) -> np.ndarray:
    """A hash uint32 of each run of WIDTH tokens."""
    words = _mixed(tokens.astype(np.uint32))
    sums = words[: len(words) - WIDTH + 1].copy()
    for place in range(1, WIDTH):
        sums *= np.uint32(0x9E3779B1)  # odd: modulo 2^32, so each place has a weight of its own
        sums += words[place : place + len(sums)]
    return _mixed(sums)


def _mixed(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer, one to one on 32 bits; 0 is kept apart from EMPTY by an offset."""
    mixed = values + np.uint32(0x7F4A7C15)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _filled(table: np.ndarray) -> np.ndarray:
    """Give each empty bin another one's value: round by round that of a partner, which may have been filled before. So
    a bin looks at all others in an order of its own, the same for all documents, until one is not empty.
    """
    rows = np.flatnonzero((table == EMPTY).any(axis=1))
    turn = 0
    while len(rows):
        turn += 1
        partner = np.argsort(_mixed(np.arange(BINS * turn, BINS * (turn + 1), dtype=np.uint32)))
        part = table[rows]
        part = np.where(part == EMPTY, part[:, partner], part)
        table[rows] = part
        rows = rows[(part == EMPTY).any(axis=1)]
    return table


def near_pairs(values: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of sketches that agree in a share of at least ``threshold``: int64 [pairs, 2], the smaller number first.

    A group of documents that are all alike is told by enough of its pairs to hold it together, not by all of them. At
    a similarity of 0.8 a pair is seen with a probability of 1 - (1 - 0.8^4)^32, all but 5 in 10 million.
    """
    found = np.zeros(0, np.int64)
    if not len(values):
        return found.reshape(0, 2)
    bands = np.ascontiguousarray(values).view(np.uint64)
    for band in range(bands.shape[1]):
        column = np.ascontiguousarray(bands[:, band])
        order = np.argsort(column, kind="stable")
        same = column[order][1:] == column[order][:-1]
        begins = np.flatnonzero(np.concatenate([[True], ~same]))
        leaders = np.repeat(order[begins], np.diff(np.append(begins, len(order))))[1:]
        pairs = np.concatenate(
            [np.stack([leaders[same], order[1:][same]]), np.stack([order[:-1][same], order[1:][same]])], axis=1
        )
        codes = np.setdiff1d(pairs[0] * len(values) + pairs[1], found)
        alike = similarity(values, codes // len(values), codes % len(values)) >= threshold
        found = np.union1d(found, codes[alike])
    return np.stack([found // len(values), found % len(values)], axis=1)


def similarity(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of pairs of sketches, float64 [pairs]."""
    blocks = range(0, len(first), PAIRS_AT_ONCE)
    parts = [
        (values[first[at : at + PAIRS_AT_ONCE]] == values[second[at : at + PAIRS_AT_ONCE]]).mean(axis=1)
        for at in blocks
    ]
    return np.concatenate([np.zeros(0), *parts])


def groups(pairs: np.ndarray) -> list[list[int]]:
    """Numbers that pairs hold together, each group and all groups sorted."""
    leader: dict[int, int] = {}

    def find(number: int) -> int:
        while leader.setdefault(number, number) != number:
            leader[number] = number = leader[leader[number]]
        return number

    for one, two in pairs.tolist():
        low, high = sorted((find(one), find(two)))
        leader[high] = low
    members: dict[int, list[int]] = {}
    for number in sorted(leader):
        members.setdefault(find(number), []).append(number)
    return [members[first] for first in sorted(members)]

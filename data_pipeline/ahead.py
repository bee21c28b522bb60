"""What samples are made of, found for many at once where they are read one after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

AHEAD = 16  # times as many samples as are asked for: finding them takes little longer


class Kept(NamedTuple):
    """What was found last: columns, [n] each, of samples ``begin`` to ``end - 1``; bounds: of each sample in them."""

    begin: int = 0
    end: int = -1
    columns: Any = None
    bounds: tuple[int, ...] | list[int] = ()


class Ahead:
    """Asks ``find`` for more than is wanted, as long as the next samples are those after the last ones.

    Args:
        find: (first sample, number of samples) -> a NamedTuple of columns [n], of which the first, ascending, is the
            sample counted from the first one. A ValueError for samples that are not asked for yet is not raised.

    Threads may share one: what is kept is replaced as a whole.
    """

    def __init__(self, find: Callable[[int, int], Any]) -> None:
        self._find, self._kept, self._next = find, Kept(), 0

    def __call__(self, start: int, count: int) -> Any:
        """What ``find`` finds."""
        kept = self._kept
        if not (kept.begin <= start and start + count <= kept.end):
            kept = self._kept = self._found(start, count)
        self._next = start + count
        low, high = kept.bounds[start - kept.begin], kept.bounds[start + count - kept.begin]
        rows, *others = (column[low:high] for column in kept.columns)
        return type(kept.columns)(rows - (start - kept.begin), *others)

    def _found(self, start: int, count: int) -> Kept:
        many = AHEAD * count if start == self._next else count
        try:
            columns = self._find(start, many)
        except ValueError:
            if many == count:
                raise
            columns, many = self._find(start, count), count
        bounds = np.searchsorted(columns[0], np.arange(many + 1)).tolist()
        return Kept(start, start + many, columns, bounds)

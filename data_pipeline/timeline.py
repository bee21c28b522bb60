"""Which source each sample of a mixture is of: a pure function of its global index and the history of the mixture.

    phase:    from one edit of the sources to the next; a source is read on from where it was
    segment:  a stretch of a phase with the same weights; ends where a schedule says so or a source is used up
    inside:   the j-th sample of a source with share w is due at (j + 1/2) / w; samples come in the order they are due

After n samples of a segment, a source has had w n of them, to within 1/2 + w K / 2, where K sources are mixed. Nothing
is counted along the way: any sample is found in the time that it takes to find the first.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

AHEAD = 4096  # samples that are looked up together


@dataclass(frozen=True)
class Share:
    """A source's part in a mixture.

    weights: (first global sample, weight) pairs, the first at 0. cap: samples that it gives at most. data: what tells
    its samples from those of other data.
    """

    name: str
    weights: tuple[tuple[int, float], ...] = ((0, 1.0),)
    cap: int | None = None
    data: str = ""

    def weight(self, sample: int) -> float:
        return [weight for first, weight in self.weights if first <= sample][-1]


@dataclass(frozen=True)
class Phase:
    """A mixture from the global sample ``start`` on; ``taken``: samples that each source, also a former one, gave."""

    start: int
    shares: tuple[Share, ...]
    taken: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Segment:
    """Sources ``numbers`` [K] of weights [K] (sum 1) for samples ``start`` to ``end`` - 1; ``taken`` [all] before."""

    start: int
    end: float
    numbers: np.ndarray
    weights: np.ndarray
    taken: np.ndarray

    def counts(self, due: float) -> list[int]:
        """Samples of each source that are due before ``due``; consistent with ``_due`` to the last bit."""
        found = []
        for weight in self.weights.tolist():
            count = max(0, math.ceil(due * weight - 0.5))
            while count and _due(count - 1, weight) >= due:
                count -= 1
            while _due(count, weight) < due:
                count += 1
            found.append(count)
        return found

    def order(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of its samples ``first`` to ``first + count - 1``: place in ``numbers``, and how many of it came before."""
        many = len(self.numbers)
        before, after = self.counts(first - many), self.counts(first + count + many)
        ordinals = [np.arange(begin, end) for begin, end in zip(before, after, strict=True)]
        due = np.concatenate([_due(own, weight) for own, weight in zip(ordinals, self.weights.tolist(), strict=True)])
        places = np.repeat(np.arange(many), [len(own) for own in ordinals])
        chosen = np.argsort(due, kind="stable")[first - sum(before) :][:count]
        return places[chosen], np.concatenate(ordinals)[chosen]

    def used_up(self, place: int, left: int) -> int:
        """The segment's samples until the source has given ``left``."""
        last = _due(left - 1, self.weights[place])
        counts = self.counts(last)
        ties = sum(_due(counts[other], self.weights[other]) == last for other in range(place))
        return sum(counts) + ties + 1

    def taken_after(self, count: int) -> np.ndarray:
        """Samples that each source has given after ``count`` of the segment's, and before it."""
        given = np.array(self.counts(count - len(self.numbers)))  # the first few, and the rest one by one
        rest = count - int(given.sum())
        if rest:
            given += np.bincount(self.order(count - rest, rest)[0], minlength=len(given))
        taken = self.taken.copy()
        taken[self.numbers] += given
        return taken


def _due(ordinal: Any, weight: float) -> Any:
    return (ordinal + 0.5) / weight


class Timeline:
    """The phases of a mixture, oldest first.

    Attributes:
        names: of all sources that ever were in it; a source's number is its place here.

    Raises:
        ValueError: no source, two of one name, weights that are no shares.
    """

    def __init__(self, phases: Iterable[Phase]) -> None:
        self.phases = tuple(phases)
        for phase in self.phases:
            _check(phase.shares)
        self.names = list(dict.fromkeys(share.name for phase in self.phases for share in phase.shares))
        self._segments: list[_Segment] = []
        self._kept = 0, (np.empty(0, np.int64), np.empty(0, np.int64))  # the last answer, and more

    @classmethod
    def of(cls, shares: Sequence[Share]) -> Self:
        """A mixture that was never edited."""
        return cls([Phase(0, tuple(shares))])

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Self:
        """What ``state`` gave, from JSON. Raises ValueError for anything else."""
        try:
            phases = [
                Phase(
                    phase["start"],
                    tuple(
                        Share(**share | {"weights": tuple((int(a), float(w)) for a, w in share["weights"])})
                        for share in phase["shares"]
                    ),
                    dict(phase["taken"]),
                )
                for phase in state
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's record of the data mixture is damaged ({error}); use another") from None
        return cls(phases)

    def state(self) -> list[dict[str, Any]]:
        """For the checkpoint, JSON."""
        return [asdict(phase) for phase in self.phases]

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources of the latest phase."""
        return self.phases[-1].shares

    def edited(self, cursor: int, shares: Sequence[Share]) -> "Timeline":
        """The same mixture up to global sample ``cursor``, and ``shares`` from there on.

        A source that stays, or comes back, goes on where it was. Raises ValueError where one holds other data than it
        did, which would repeat some of its samples and leave out others.
        """
        known = {share.name: share.data for phase in self.phases for share in phase.shares}
        for share in shares:
            if known.get(share.name, share.data) != share.data:
                raise ValueError(
                    f"source {share.name!r} holds other data than when it was last read: some of its samples would "
                    "come twice and others never; restore it, or give the new data another data.sources.name"
                )
        if tuple(shares) == self.shares:
            return self
        kept = [phase for phase in self.phases if phase.start < cursor]
        taken = Timeline(kept).taken(cursor) if kept else {}
        return Timeline([*kept, Phase(cursor, tuple(shares), taken)])

    def where(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number and index in the source of samples ``start`` to ``start + count - 1``, both int64 [count]."""
        if start < 0 or count < 1:
            raise ValueError(f"samples {start} to {start + count - 1}: start must be 0 or more, count 1 or more")
        begin, kept = self._kept
        if not begin <= start <= start + count <= begin + len(kept[0]):
            begin, kept = start, self._where(start, count)
            with suppress(ValueError):  # the sources are used up before
                kept = self._where(start, max(count, AHEAD))
            self._kept = begin, kept
        return kept[0][start - begin :][:count], kept[1][start - begin :][:count]

    def _where(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, indices = [], []
        for segment in self._until(start + count):
            first, end = max(start, segment.start), min(start + count, segment.end)
            if first < end:
                places, ordinals = segment.order(first - segment.start, int(end) - first)
                own = segment.numbers[places]
                numbers.append(own)
                indices.append(segment.taken[own] + ordinals)
        return np.concatenate(numbers), np.concatenate(indices)

    def taken(self, cursor: int) -> dict[str, int]:
        """Samples that each source gave before global sample ``cursor``."""
        if not cursor:
            return dict.fromkeys(self.names, 0)
        segment = next(found for found in self._until(cursor) if found.end >= cursor)
        return dict(zip(self.names, segment.taken_after(cursor - segment.start).tolist(), strict=True))

    def _until(self, end: int) -> list[_Segment]:
        """The segments, as far as they are needed for the samples before ``end``; several threads may ask."""
        segments = list(self._segments)
        while not segments or segments[-1].end < end:
            if not segments:
                start, taken = 0, np.zeros(len(self.names), np.int64)
            else:
                last = segments[-1]
                start = int(last.end)
                taken = last.taken_after(start - last.start)
            segments.append(self._segment(start, taken))
        self._segments = segments
        return segments

    def _segment(self, start: int, taken: np.ndarray) -> _Segment:
        phase = [phase for phase in self.phases if phase.start <= start][-1]
        later = [other.start for other in self.phases if other.start > start]
        later += [first for share in phase.shares for first, _ in share.weights if first > start]
        places = {share.name: self.names.index(share.name) for share in phase.shares}
        left = {s.name: math.inf if s.cap is None else s.cap - int(taken[places[s.name]]) for s in phase.shares}
        live = [share for share in phase.shares if share.weight(start) > 0 and left[share.name] > 0]
        if not live:
            raise ValueError(
                f"the mixture has no sample after the first {start:,}: all sources are used up; raise "
                "data.sources.epochs, or lower train.steps"
            )
        weights = np.array([share.weight(start) for share in live])
        numbers = np.array([places[share.name] for share in live])
        segment = _Segment(start, min(later, default=math.inf), numbers, weights / weights.sum(), taken)
        ends = [
            start + segment.used_up(place, int(left[share.name]))
            for place, share in enumerate(live)
            if left[share.name] < math.inf
        ]
        return _Segment(start, min(segment.end, *ends, math.inf), numbers, segment.weights, taken)


def _check(shares: Sequence[Share]) -> None:
    if not shares:
        raise ValueError("mixture: no source; name at least one")
    names = [share.name for share in shares]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two sources are called {twice!r}; give each a data.sources.name of its own")
    for share in shares:
        steps = [first for first, _ in share.weights]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
            raise ValueError(
                f"source {share.name!r}: a schedule of weights begins at 0 tokens and goes up, this has {steps}"
            )
        if not all(0 <= weight < math.inf for _, weight in share.weights):
            raise ValueError(f"source {share.name!r}: weights {[w for _, w in share.weights]}: each must be 0 or more")
        if share.cap is not None and share.cap < 1:
            raise ValueError(f"source {share.name!r}: a cap of {share.cap} samples; give at least one, or leave it out")

"""What is done about samples that cannot be used: a function that is passed in, called with each."""

import sys
import threading
from collections import Counter
from typing import NamedTuple


class Problem(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r}: {self.why}"


class Skip:
    """Count each sample once, and log the first ``limit`` of them to standard error.

    Args:
        source: what the samples are of, for the log.

    Attributes:
        counts: samples left out, by shard. num_skipped: their sum.
    """

    def __init__(self, limit: int = 100, source: str = "the data") -> None:
        self.limit, self.source, self.counts = limit, source, Counter[str]()
        self._told = 0
        self._seen: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __call__(self, problem: Problem) -> None:
        with self._lock:
            if problem[:2] in self._seen:
                return
            self._seen.add(problem[:2])
            self.counts[problem.shard] += 1
            if len(self._seen) <= self.limit:
                last = "; further ones are only counted" if len(self._seen) == self.limit else ""
                print(f"skipped: {problem}{last}", file=sys.stderr)

    def tell_total(self) -> None:
        """Log how many they are; nothing if none came since it was last told."""
        with self._lock:
            if self.num_skipped > self._told:
                self._told = self.num_skipped
                print(f"skipped: {self._told:,} samples of {self.source} in all", file=sys.stderr)

    @property
    def num_skipped(self) -> int:
        return len(self._seen)


def fatal(problem: Problem) -> None:
    """Raise ValueError for the first sample that cannot be used."""
    raise ValueError(f"{problem}; mend or remove it, or skip such samples")

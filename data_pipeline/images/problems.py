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

    Attributes:
        counts: samples left out, by shard. num_skipped: their sum.
    """

    def __init__(self, limit: int = 100) -> None:
        self.limit, self.counts = limit, Counter[str]()
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

    @property
    def num_skipped(self) -> int:
        return len(self._seen)


def fatal(problem: Problem) -> None:
    """Raise ValueError for the first sample that cannot be used."""
    raise ValueError(f"{problem}; mend or remove it, or skip such samples")

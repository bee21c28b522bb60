"""What a person sees while something takes long: a bar with an estimate of the time left, or the time passed."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def byte_bar(what: str, total: int, *, show: bool, keep: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes; gives the function that is told how many more are done.

    ``keep``: the full bar stays at the end, also in a log file; else it is seen on a terminal only, while it moves.
    """
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=not keep) as bar:
        task = bar.add_task("", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


@contextlib.contextmanager
def elapsed(what: str, *, show: bool) -> Iterator[None]:
    """The time that passes, for work that cannot say how far it is."""
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), disable=not show) as line:
        task = line.add_task("", total=None)
        yield
        line.update(task, total=1, completed=1)  # stops the clock

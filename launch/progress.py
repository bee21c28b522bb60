"""The bar of commands that move many bytes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_WITHOUT_BAR = 2
Advance = Callable[[int], None]  # called with the number of bytes just done


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int | None], Advance]]:
    """Start a part with `bar(description, bytes)`, move it with what that gives; shown once 2 s have passed, or at once
    for a part of unknown length (None), which nothing moves.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    begin = time.monotonic()

    def start(description: str, total: int | None) -> Advance:
        task = progress.add_task(description, total=total)

        def advance(count: int) -> None:
            progress.advance(task, count)
            if total is None or time.monotonic() - begin > SECONDS_WITHOUT_BAR:
                progress.start()

        advance(0)
        return advance

    try:
        yield start
    finally:
        progress.stop()

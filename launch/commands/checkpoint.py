"""pretrain checkpoint list, verify"""

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from checkpoints.store import CheckpointInfo, CheckpointStore


def list_(args: argparse.Namespace) -> None:
    """A table of the run's checkpoints."""
    table = Table("step", "size", "saved (UTC)", "state", box=None, header_style="bold")
    for info in _checkpoints(args.run):
        size = f"{info.bytes / 1e6:,.1f} MB"
        table.add_row(str(info.step), size, info.created, info.problem or "whole")
    Console(soft_wrap=True).print(table)


def verify(args: argparse.Namespace) -> int:
    """Read every byte; exit code 1 when a checkpoint has a problem."""
    infos = _checkpoints(args.run)
    if args.step is not None:
        infos = [info for info in infos if info.step == args.step]
        if not infos:
            raise FileNotFoundError(f"{args.run} has no checkpoint of step {args.step}")
    store = CheckpointStore(Path(args.run) / "checkpoints")
    damaged = 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        for info in infos:
            task = progress.add_task(f"step {info.step}", total=info.bytes)
            problems = store.verify(info.step, partial(progress.advance, task))
            damaged += bool(problems)
            for line in problems or ["whole"]:
                progress.console.print(f"step {info.step}: {line}", soft_wrap=True, highlight=False)
    return 1 if damaged else 0


def _checkpoints(run: str) -> list[CheckpointInfo]:
    folder = Path(run) / "checkpoints"
    infos = CheckpointStore(folder).list()
    if not infos:
        raise FileNotFoundError(f"{folder}: no checkpoints there; give the folder of a run")
    return infos

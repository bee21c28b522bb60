"""pretrain checkpoint list, verify"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints.store import CheckpointInfo, CheckpointStore
from launch.progress import progress_bar


def list_(args: argparse.Namespace) -> None:
    """A table of the run's checkpoints."""
    table = Table("step", "size", "saved (UTC)", "state", box=None, header_style="bold")
    infos = _checkpoints(args.run)
    for info in infos:
        size = f"{info.bytes / 1e6:,.1f} MB"
        table.add_row(str(info.step), size, info.created, info.problem or "whole")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for line in _lineage(infos[-1]):
        console.print(line, markup=False)


def verify(args: argparse.Namespace) -> int:
    """Read every byte; exit code 1 when a checkpoint has a problem."""
    infos = _checkpoints(args.run)
    if args.step is not None:
        infos = [info for info in infos if info.step == args.step]
        if not infos:
            raise FileNotFoundError(f"{args.run} has no checkpoint of step {args.step}")
    store = CheckpointStore(Path(args.run) / "checkpoints")
    damaged = 0
    console = Console(soft_wrap=True, highlight=False)
    with progress_bar(console) as bar:
        for info in infos:
            problems = store.verify(info.step, bar(f"step {info.step}", info.bytes))
            damaged += bool(problems)
            for line in problems or ["whole"]:
                console.print(f"step {info.step}: {line}")
            for line in _lineage(info):
                console.print(f"step {info.step}: {line}", markup=False)
    return 1 if damaged else 0


def _lineage(info: CheckpointInfo) -> list[str]:
    """What a checkpoint was derived from, newest first."""
    return [f"derived by {origin}" for origin in reversed(info.lineage)]


def _checkpoints(run: str) -> list[CheckpointInfo]:
    folder = Path(run) / "checkpoints"
    infos = CheckpointStore(folder).list()
    if not infos:
        raise FileNotFoundError(f"{folder}: no checkpoints there; give the folder of a run")
    return infos

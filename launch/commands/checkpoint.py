"""pretrain checkpoint list, verify, pin, unpin, rewind"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints.remote import Remote
from checkpoints.retention import check_whole, read_metrics
from checkpoints.retention import pin as pin_step
from checkpoints.retention import rewind as rewind_to
from checkpoints.retention import unpin as unpin_step
from checkpoints.store import CheckpointInfo, CheckpointStore
from launch.progress import progress_bar
from pretrain.config import load_run_config
from pretrain.lock import RunLock

CUT_BACK = ("metrics.jsonl", "ledger.bin")  # files of a run that lose their later lines when it goes on from before


def list_(args: argparse.Namespace) -> None:
    """A table of the run's checkpoints."""
    table = Table("step", "size", "saved (UTC)", "state", "", box=None, header_style="bold")
    infos = _checkpoints(args.run)
    for info in infos:
        size = f"{info.bytes / 1e6:,.1f} MB"
        facts = ["pinned"] * info.pinned + [f"{key} {value:.4f}" for key, value in read_metrics(info.path).items()]
        table.add_row(str(info.step), size, info.created, info.problem or "whole", "  ".join(facts))
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


def pin(args: argparse.Namespace) -> None:
    """The checkpoint is kept whatever the recipe says."""
    pin_step(Path(args.run) / "checkpoints", args.step)
    _carry_pins(Path(args.run))
    print(f"step {args.step} stays; let go of it with: pretrain checkpoint unpin {args.run} {args.step}")


def unpin(args: argparse.Namespace) -> None:
    """It is kept as the recipe says, from the next save on."""
    unpin_step(Path(args.run) / "checkpoints", args.step)
    _carry_pins(Path(args.run))
    print(f"step {args.step} stays as long as the recipe keeps it")


def rewind(args: argparse.Namespace) -> None:
    """Set the newer checkpoints aside, so that the next start goes on from an older one."""
    run = Path(args.run)
    _checkpoints(args.run)
    lock = RunLock(run)
    lock.take()
    try:
        check_whole(run / "checkpoints", args.step)
        if remote := _remote(run):
            remote.set_aside(after=args.step)
        aside = rewind_to(run / "checkpoints", args.step, also=[run / name for name in CUT_BACK])
    finally:
        lock.release()
    if aside is None:
        print(f"step {args.step} is the newest already")
    else:
        print(f"the next start goes on from step {args.step}; newer checkpoints are in {aside}, nothing is deleted")


def _carry_pins(run: Path) -> None:
    """The copies are pinned alike."""
    if remote := _remote(run):
        remote.carry_pins(run / "checkpoints")


def _remote(run: Path) -> Remote | None:
    """Where the run's checkpoints are copied to, if anywhere. Raises ValueError where another run's are."""
    url = load_run_config(run).checkpoint.remote if (run / "config.toml").is_file() else ""
    if not url:
        return None
    remote = Remote(url)
    remote.claim(run / "checkpoints")
    return remote


def _lineage(info: CheckpointInfo) -> list[str]:
    """What a checkpoint was derived from, newest first."""
    return [f"derived by {origin}" for origin in reversed(info.lineage)]


def _checkpoints(run: str) -> list[CheckpointInfo]:
    folder = Path(run) / "checkpoints"
    infos = CheckpointStore(folder).list()
    if not infos:
        raise FileNotFoundError(f"{folder}: no checkpoints there; give the folder of a run")
    return infos

"""pretrain checkpoint diff"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints.manifest import PARTS, Manifest
from checkpoints.surgery.arithmetic import Products
from checkpoints.surgery.diff import Difference, diff
from launch.commands.convert import find_checkpoint
from launch.progress import progress_bar


def diff_(args: argparse.Namespace) -> None:
    """Print how far two checkpoints are apart, the tensors that changed most first."""
    a, b = (find_checkpoint(Path(run), None)[1] for run in (args.a, args.b))
    parts = PARTS if args.optimizer else PARTS[:1]
    console = Console(soft_wrap=True, highlight=False)
    entries = Manifest.read(a).files.items()
    num_bytes = sum(entry.bytes for name, entry in entries if name.partition("/")[0] in parts)
    with progress_bar(Console(stderr=True)) as bar:
        found = diff(a, b, optimizer=args.optimizer, progress=bar("comparing", num_bytes))
    if args.json:
        print(json.dumps(_as_json(a, b, found, parts), indent=1, allow_nan=False))
        return
    console.print(f"a: {a}\nb: {b}", markup=False)
    _print_changes(console, found, args.top, args.optimizer)
    for title, lines in (("unlike", found.unlike), ("only in a", found.only_a), ("only in b", found.only_b)):
        for line in lines:
            console.print(f"{title}: {line}", markup=False)
    if found.equal:
        console.print(f"equal, bit for bit: {len(found.changes)} tensors")
        return
    changed = sum(not change.equal for change in found.changes)
    console.print(f"{changed} of {len(found.changes)} tensors in both differ")
    for part in parts:
        total = found.total(part)
        console.print(f"{part} as a whole: relative L2 {total.relative:.3g}, cosine {total.cosine:.6f}")


def _print_changes(console: Console, found: Difference, top: int, optimizer: bool) -> None:
    changed = [change for change in found.changes if not change.equal]
    if not changed:
        return
    table = Table("tensor", "relative L2", "max abs", "cosine", box=None, header_style="bold")
    for change in changed[:top]:
        of = change.products
        name = f"{change.part} {change.name}" if optimizer else change.name
        table.add_row(name, f"{of.relative:.3g}", f"{of.largest:.3g}", f"{of.cosine:.6f}")
    console.print(table)
    if len(changed) > top:
        console.print(f"and {len(changed) - top} more (--top)")


def _as_json(a: Path, b: Path, found: Difference, parts: tuple[str, ...]) -> dict[str, Any]:
    return {
        "a": str(a),
        "b": str(b),
        "equal": found.equal,
        "total": {part: _numbers(found.total(part)) for part in parts},
        "tensors": [
            {"part": change.part, "name": change.name, "equal": change.equal, **_numbers(change.products)}
            for change in found.changes
        ],
        "unlike": found.unlike,
        "only_a": found.only_a,
        "only_b": found.only_b,
    }


def _numbers(products: Products) -> dict[str, float | None]:
    """null stands for what is no finite number, such as a relative change from zeros."""
    numbers = {"relative": products.relative, "max_abs": products.largest, "cosine": products.cosine}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

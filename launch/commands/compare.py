"""pretrain compare"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from launch.local import STARTED
from launch.rundir import error_in
from parallel.engine import ENGINES, check_installed
from pretrain.config import resolve
from pretrain.report import write_report

POLL = 0.05  # seconds
WARM = 3  # steps that are left out of the speed: they compile, allocate and open connections


class Result(NamedTuple):
    """One engine's run: losses by step; tokens/s; gigabytes of rank 0; seconds from the command to the first step."""

    engine: str
    losses: dict[int, float]
    speed: float
    memory: float
    start: float


def compare(args: argparse.Namespace) -> None:
    """The same steps under each engine in turn, with the same data and weights: losses, speed, memory, start."""
    engines = args.engines.split(",")
    if strange := [name for name in engines if name not in ENGINES]:
        raise ValueError(f"--engines: {strange[0]!r} is unknown; any of {','.join(ENGINES)}")
    if args.steps <= WARM:
        raise ValueError(f"--steps {args.steps}: must be more than {WARM}, the steps that speed is not measured at")
    out = Path(args.out)
    for name in engines:  # before anything runs
        resolve(args.recipe, [*args.overrides, f"engine={name}", f"train.steps={args.steps}"])
        check_installed(name)
        if (out / name).exists():
            raise ValueError(f"{out / name} is there already; give another --out")
    results = [_run(args, name, out / name) for name in engines]
    for line in table(results):
        print(line)
    write_report([out / name for name in engines], out / "compare.html")
    print(f"curves: {out / 'compare.html'}")


def _run(args: argparse.Namespace, engine: str, folder: Path) -> Result:
    overrides = [f"engine={engine}", f"run.dir={json.dumps(str(folder))}", f"train.steps={args.steps}", "log.every=1"]
    overrides += ["checkpoint.remote="]  # of none of them
    words = ["run", args.recipe, *args.overrides, *overrides, *(["--nproc", str(args.nproc)] if args.nproc else [])]
    folder.mkdir(parents=True)
    log, metrics = folder / "console.log", folder / "metrics.jsonl"
    print(f"{engine}: pretrain {' '.join(words)}", flush=True)
    environment = {key: value for key, value in os.environ.items() if key != STARTED}
    begin, first = time.monotonic(), None
    with log.open("wb") as console:
        command = [sys.executable, "-P", "-m", "launch.cli", *words]
        started = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, env=environment)
        try:
            while started.poll() is None:
                if first is None and metrics.is_file() and metrics.stat().st_size:
                    first = time.monotonic() - begin
                time.sleep(POLL)
        finally:
            if started.poll() is None:
                started.terminate()
                started.wait()
    if started.returncode:
        said = error_in(log.read_text(errors="replace")) or "it does not say why"
        raise ValueError(f'engine = "{engine}" ended with code {started.returncode}: {said}; see {log}')
    return read_result(engine, folder, first or time.monotonic() - begin)


def read_result(engine: str, folder: Path, start: float) -> Result:
    """What a run's metrics.jsonl says."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return Result(
        engine,
        {line["step"]: line["loss"] for line in steps},
        median(line["tokens_per_s"] for line in steps[WARM:]),
        max(line["memory_gb"] for line in steps),
        start,
    )


def table(results: list[Result]) -> list[str]:
    """Lines: the loss of each step and how far the others' are from the first engine's, relatively; then a summary."""
    first, *others = results
    heads = ["step", f"loss {first.engine}", *(f"{other.engine} - {first.engine}" for other in others)]
    rows = [heads]
    for step, loss in first.losses.items():
        rows.append([str(step), f"{loss:.6f}", *(f"{(other.losses[step] - loss) / loss:+.1e}" for other in others)])
    worst = [max(abs(o.losses[step] - loss) / abs(loss) for step, loss in first.losses.items()) for o in others]
    summary = [["engine", "largest difference", "tokens/s", "of the first", "peak GB", "first step after s"]]
    for result, difference in zip(results, [0.0, *worst], strict=True):
        ratio = f"{result.speed / first.speed:.2f}"
        figures = [f"{difference:.1e}", f"{result.speed:,.0f}", ratio, f"{result.memory:.2f}", f"{result.start:.1f}"]
        summary.append([result.engine, *figures])
    return [*_aligned(rows), "", *_aligned(summary)]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

"""pretrain status"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.starts import STOPPED, Start
from launch.status import RunStatus, find_runs, is_run, points, read_all

RUNS = Path("runs")  # where recipes put runs, unless they say otherwise
PIPE_WIDTH = 200  # columns where no terminal says how many it has
LONGEST_WHY = 160  # letters of it in a table of several runs
COLOURS = {"running": "green", "finished": "bold green", "failed": "bold red", "lost": "bold red", "stopped": "yellow"}
Shown = list[tuple[list[str], RunStatus]]  # the overrides of a sweep's point, and how it stands


def status(args: argparse.Namespace) -> None:
    """Show runs once, or again and again until all of them have ended."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    chosen = [Path(run) for run in args.runs]
    for run in chosen:
        if not is_run(run):
            found = "is no run" if run.is_dir() else "does not exist"
            raise FileNotFoundError(f"{run} {found}: give the folder of a run or of a sweep, such as runs/demo")
    if args.json:
        print(json.dumps([_record(*shown) for shown in _read(chosen)], indent=2))
    elif args.watch:
        _watch(console, chosen, args.interval)
    else:
        console.print(_show(chosen, _read(chosen)))


def _watch(console: Console, chosen: Sequence[Path], interval: float) -> None:
    if not interval > 0:
        raise ValueError(f"--interval {interval:g}: give seconds, more than 0")
    shown = _read(chosen)
    try:
        with Live(_show(chosen, shown), console=console, auto_refresh=False, vertical_overflow="visible") as live:
            while any(run.going for _, run in shown):
                time.sleep(interval)
                shown = _read(chosen)
                live.update(_show(chosen, shown), refresh=True)
    except KeyboardInterrupt:
        pass


def _read(chosen: Sequence[Path]) -> Shown:
    """The runs, each sweep by its points."""
    named: dict[Path, list[str]] = {}
    for folder in chosen or find_runs(RUNS):
        named |= dict(points(folder)) or {folder: []}
    return list(zip(named.values(), read_all(named), strict=True))


def _record(overrides: list[str], run: RunStatus) -> dict[str, Any]:
    return {**asdict(run), "restarts": run.restarts, "overrides": overrides}


def _show(chosen: Sequence[Path], shown: Shown) -> RenderableType:
    if not shown:
        return f"no runs in {RUNS}/; give the folder of a run"
    if len(shown) == 1 and chosen:
        return _one(shown[0][1])
    return _table(shown)


def _table(shown: Shown) -> Table:
    """A line a run; the overrides of sweeps a column each."""
    keys = list(dict.fromkeys(word.partition("=")[0] for overrides, _ in shown for word in overrides))
    evaluated = any(run.eval_loss is not None for _, run in shown)
    heads = ["run", *keys, "state", "step", "loss", *(["eval loss"] if evaluated else [])]
    heads += ["tokens/s", "ETA", "restarts", "checkpoint", "job", "why"]
    table = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for overrides, run in shown:
        values = dict(word.split("=", 1) for word in overrides)
        row = [run.run, *(values.get(key, "") for key in keys), run.state, _steps(run), _number(run.loss, "{:.4f}")]
        row += [_number(run.eval_loss, "{:.4f}")] if evaluated else []
        row += [_number(run.tokens_per_s, "{:,.0f}"), _eta(run), str(run.restarts), _number(run.checkpoint, "{}")]
        why = "; ".join([run.why, *run.notes]).strip("; ")
        row += [_job(run), why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}..."]
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "") if cell == run.state else "") for cell in row))
    return table


def _one(run: RunStatus) -> RenderableType:
    """Everything about one run."""
    state = Text.assemble((run.state, COLOURS.get(run.state, "")), f": {run.why}" if run.why else "")
    lines = Table.grid(padding=(0, 2))
    speed = f"{run.tokens_per_s:,.0f} tokens/s" if run.tokens_per_s is not None else ""
    eta = f"ETA {_eta(run)}" if run.eta is not None else ""
    loss = f"loss {run.loss:.4f}" if run.loss is not None else ""
    held_out = f"eval loss {run.eval_loss:.4f}" if run.eval_loss is not None else ""
    rows: list[tuple[str, str | Text]] = [
        ("run", run.run),
        ("state", state),
        ("step", ", ".join(word for word in (_steps(run), loss, held_out, speed, eta) if word)),
        ("checkpoint", _checkpoint(run)),
    ]
    for job in run.jobs:
        reason = f" ({job.reason})" if job.reason else ""
        nodes = f" on {job.nodes}" if job.nodes else f", {job.num_nodes} nodes"
        rows.append(("job", f"{job.job} {job.state}{reason}{nodes}, limit {job.limit}"))
    if run.phase is not None:
        quiet = f"; rank {run.silent_rank} last moved on {_span(run.silent)} ago" if (run.silent or 0) > 10 else ""
        rows.append(("phase", f"{run.phase}{quiet}"))
    if run.slowest is not None:
        pace = run.slowest
        others = f"{pace.seconds:.3g} s a step of its own, the others {pace.median:.3g} s"
        rows.append(("slowest rank", f"{pace.rank} on {pace.host}: {others}"))
    for pace in run.stragglers:
        rows.append(("straggler", f"rank {pace.rank} on {pace.host}: {pace.seconds:.3g} s, others {pace.median:.3g} s"))
    rows += [("note", note) for note in run.notes]
    for name, value in rows:
        lines.add_row(Text(name, style="bold"), Text(value) if isinstance(value, str) else value)
    history: list[RenderableType] = ["", _starts(run)] if run.starts else []
    return Group(lines, *history)


def _starts(run: RunStatus) -> Table:
    table = Table("started (UTC)", "job", "hosts", "from", "to", "ended", box=None, header_style="bold", pad_edge=False)
    for number, start in enumerate(run.starts):
        latest = number == len(run.starts) - 1
        came = start.end_step
        if came is None and latest and run.step is not None:
            came = run.step
        job = f"{start.job}.{start.restart}" if start.job else "local"
        hosts = ", ".join(start.hosts[:4]) + (f" and {len(start.hosts) - 4} more" if len(start.hosts) > 4 else "")
        cells = [_time(start.time), job, hosts, _number(start.step, "{}"), _number(came, "{}")]
        table.add_row(*map(Text, cells), _ending(start, latest and run.going))
    return table


def _ending(start: Start, going: bool) -> Text:
    if start.reason is None:
        if going:
            return Text("")
        return Text("not recorded" if start.time is None else "lost: killed hard", style=COLOURS["lost"])
    by = f"rank {start.rank}: " if start.rank is not None and start.reason not in STOPPED else ""
    style = "" if start.reason in STOPPED else COLOURS["failed"]
    return Text(f"{start.reason}: {by}{start.detail}" if start.detail else start.reason, style=style)


def _steps(run: RunStatus) -> str:
    if run.target is None:
        return _number(run.step, "{}")
    return f"{run.step or 0}/{run.target}"


def _checkpoint(run: RunStatus) -> str:
    if run.checkpoint is None:
        return "none"
    ago = f", {_span(time.time() - run.checkpoint_time)} ago" if run.checkpoint_time is not None else ""
    return f"step {run.checkpoint}{ago}"


def _job(run: RunStatus) -> str:
    alive = [job.job for job in run.jobs if job.alive]
    return ", ".join(alive or [job.job for job in run.jobs[-1:]])


def _eta(run: RunStatus) -> str:
    return _span(run.eta) if run.eta is not None else ""


def _span(seconds: float | None) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds or 0.0))))


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

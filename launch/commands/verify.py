"""pretrain verify-layout"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from launch.forked import Ended, run_world, warm_up
from launch.local import count_gpus, joined
from parallel.engine import ENGINES, check_installed
from parallel.layouts import all_layouts, axes_alone, describe_layout, features, suspects
from parallel.mesh import AXES, ParallelConfig
from parallel.pipeline_cut import schedule_names
from parallel.verify import MARGIN, Comparison, Row, describe_factor
from pretrain.config import RunConfig, resolve
from pretrain.shrink import Change, shrink
from pretrain.verify import (
    changed,
    check_balance,
    check_layout,
    compare_layout,
    compares_samples,
    count_experts,
    make_reference,
    measure_layout,
    optimizers,
    to_text,
    with_some_vocabulary,
)

KINDS = ("initial weights", "losses", "gradients", "norms", "weights")
PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pretrain.verify", "launch.forked")


@dataclass
class Verdict:
    """What came out of one layout. comparisons: by optimizer; refused: why it cannot be; problem: how it broke."""

    parallel: ParallelConfig
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    refused: str = ""
    problem: str = ""

    @property
    def agrees(self) -> bool:
        return not self.problem and not self.refused and all(c.agrees for c in self.comparisons.values())

    @property
    def failed(self) -> bool:
        return not self.refused and not self.agrees

    @property
    def word(self) -> str:
        return "agrees" if self.agrees else "broke" if self.problem else "not possible" if self.refused else "differs"

    def diagnosis(self) -> list[str]:
        """What is wrong, a line a finding."""
        if self.problem:
            return [self.problem]
        off = {name: comparison for name, comparison in self.comparisons.items() if not comparison.agrees}
        if not off:
            return []
        name, first = next(iter(off.items()))
        lines = first.diagnosis()
        if len(off) < len(self.comparisons):
            others = ", ".join(
                f"{n} and {c.layout.accumulation} micro-batches" for n, c in self.comparisons.items() if n not in off
            )
            lines.append(f"This is with {name} and {first.layout.accumulation} micro-batches; with {others} all agree.")
        return lines


class Certifier:
    """Runs layouts of a recipe against its one-process reference.

    config: precision and sizes as they are to run. folder: where the reference is kept. timeout: seconds of one
    layout. device: "cpu" or "cuda". threads: of the machine, shared by the processes of a layout. Raises ValueError
    where one process refuses the recipe.
    """

    measure = staticmethod(measure_layout)

    def __init__(self, config: RunConfig, steps: int, folder: str, timeout: float, device: str, threads: int = 1):
        self.config, self.steps, self.folder = config, steps, folder
        self.timeout, self.device, self.threads = timeout, device, threads
        ended = self._run(make_reference, 1, to_text(config), steps, folder)
        if ended.refused:
            raise ValueError(ended.refused)
        if ended.problem.startswith("hangs"):
            raise ValueError(f"the one-process reference takes longer than --timeout {timeout:.0f} s: raise it")
        if ended.results is None:
            raise RuntimeError(f"the one-process reference could not be made: {ended.problem}")
        self.rounding = ended.results[0]

    def verify(self, parallel: ParallelConfig, micro_batches: dict[str, int]) -> Verdict:
        """micro_batches: optimizer -> sequences of one micro-batch."""
        processes = math.prod(getattr(parallel, axis) for axis in AXES)
        whole = self.config.model_copy(update={"parallel": parallel})
        configs = {
            name: changed(whole, {"optim.name": name, "train.micro_batch": size})
            for name, size in micro_batches.items()
        }
        arguments = ([to_text(config) for config in configs.values()], self.steps, self.folder, self.rounding["eps"])
        ended = self._run(self.measure, processes, *arguments)
        if ended.results is None:
            return Verdict(parallel, refused=ended.refused, problem=ended.problem)
        by_run = dict(zip(configs, zip(*ended.results, strict=True), strict=True))
        return Verdict(
            parallel,
            {n: compare_layout(c, processes, list(by_run[n]), self.rounding[n]) for n, c in configs.items()},
        )

    def _run(self, function: Callable[..., Any], processes: int, *args: Any) -> Ended:
        threads = max(1, self.threads // processes)
        return run_world(function, processes, *args, device=self.device, timeout=self.timeout, threads=threads)


def verify_layout(args: argparse.Namespace) -> int:
    """Exit code 0 when all layouts agree with one process, 1 when one differs."""
    if joined():
        raise ValueError("verify-layout starts its own processes; run it on its own, without torchrun")
    overrides = [*args.overrides, "train.precision=fp32", *([f"engine={args.engine}"] if args.engine else [])]
    config = resolve(args.recipe, overrides)[0]
    check_installed(config.engine)
    warm_up((*PRELOADED, ENGINES[config.engine].where.partition(":")[0]))
    console = Console(soft_wrap=True, highlight=False)
    if args.timeout is None:
        args.timeout = 3600.0 if args.full_size else 120.0
    if args.steps < 1 or args.timeout <= 0:
        raise ValueError(f"--steps {args.steps}, --timeout {args.timeout}: must be above 0")
    return _all(config, args, console) if args.all is not None else _one(config, args, console)


def _one(config: RunConfig, args: argparse.Namespace, console: Console) -> int:
    processes, degrees = check_layout(config, args.nproc)
    parallel = config.parallel.model_copy(update=degrees)
    data = degrees["dp_replicate"] * degrees["dp_shard"]
    accumulation = config.train.global_batch // (config.train.micro_batch * data)
    small, changes = (with_some_vocabulary(config), []) if args.full_size else shrink(config, degrees, processes)
    micro_batch = config.train.micro_batch
    if not args.full_size:
        micro_batch = min(micro_batch, 2)
        least = 2 * degrees["pp"]  # enough for every pipeline schedule
        accumulation = min(accumulation, least + accumulation % degrees["pp"])
    if compares_samples(small):  # enough for other rows than its own
        micro_batch = max(micro_batch, 4)
    small = changed(small, {"train.micro_batch": micro_batch, "train.global_batch": micro_batch * data * accumulation})
    small = small.model_copy(update={"parallel": small.parallel.model_copy(update=degrees)})
    device = _device(processes)
    _print_changes(console, changes)
    console.print(
        f"{processes} processes on {device}, engine {config.engine}: {describe_layout(parallel)}; {accumulation} "
        "micro-batches a step"
    )
    with tempfile.TemporaryDirectory(prefix="verify-layout-") as folder:
        threads = (os.cpu_count() or 1) if args.full_size else 1
        certifier = Certifier(small, args.steps, folder, args.timeout, device, threads)
        verdict = certifier.verify(small.parallel, _sizes(small, small.parallel))
        alone = axes_alone(small.parallel) if verdict.failed else []
        parts = [certifier.verify(part, _sizes(small, part)) for part in alone]
    if verdict.refused:
        raise ValueError(verdict.refused)
    if verdict.comparisons:
        _print_scale(console, certifier.rounding)
        _print_quantities(console, verdict)
    code = _print_end(console, [verdict])
    for part in parts:
        console.print(f"{describe_layout(part.parallel)} alone: {part.word}", style=None if part.agrees else "red")
    return code


def _all(config: RunConfig, args: argparse.Namespace, console: Console) -> int:
    processes = args.all
    if processes < 1:
        raise ValueError(f"--all {processes}: must be at least 1")
    if args.full_size or args.nproc:
        raise ValueError(
            "--all goes neither with --full-size nor with --nproc: it looks at many layouts of N processes"
        )
    widest = {"pp": processes, "dp_replicate": 1, "dp_shard": 1, "cp": processes, "tp": 1}
    config = changed(config, {"parallel.stage_layers": (), "parallel.stages_per_rank": 0})
    check_balance(config)
    small, changes = shrink(config, widest, processes)
    small = changed(small, {"train.global_batch": 4 * processes, "train.micro_batch": 2})
    device = _device(processes)
    layouts = _layouts(small, processes)
    _print_changes(console, changes)
    rounds = "1 and 2 rounds" if len(optimizers(config)) > 1 else "2 rounds"
    console.print(
        f"{len(layouts)} layouts of {processes} processes on {device}, engine {config.engine}; {rounds} of "
        "micro-batches a step"
    )
    with tempfile.TemporaryDirectory(prefix="verify-layout-") as folder:
        certifier = Certifier(small, args.steps, folder, args.timeout, device)
        hidden = not sys.stdout.isatty()
        verdicts = [
            certifier.verify(layout, _rounds(small, layout))
            for layout in track(layouts, "verifying", transient=True, disable=hidden, console=console)
        ]
    _print_scale(console, certifier.rounding)
    _print_summary(console, verdicts)
    return _print_end(console, verdicts)


def _layouts(config: RunConfig, processes: int) -> list[ParallelConfig]:
    """Every one that the table of engines does not exclude."""
    layouts = all_layouts(config.parallel, processes, schedule_names(), count_experts(config))
    engine = ENGINES[config.engine]
    return [each for each in layouts if not engine.obstacles({f"parallel.{key}": value for key, value in each})]


def _sizes(config: RunConfig, parallel: ParallelConfig) -> dict[str, int]:
    """The recipe's micro-batch; all that a data rank has where samples of a step are compared with each other."""
    everything = config.train.global_batch // (parallel.dp_replicate * parallel.dp_shard)
    return dict.fromkeys(optimizers(config), everything if compares_samples(config) else config.train.micro_batch)


def _rounds(config: RunConfig, parallel: ParallelConfig) -> dict[str, int]:
    """One round of micro-batches a step with the first optimizer and two with the last; a round: one micro-batch, or
    what every schedule can do with.
    """
    if compares_samples(config):
        return _sizes(config, parallel)
    data = parallel.dp_replicate * parallel.dp_shard
    least = 2 * parallel.pp if parallel.pp > 1 else 1
    names = optimizers(config)
    return {
        name: config.train.global_batch // (data * least * rounds)
        for rounds, name in enumerate(names, start=3 - len(names))
    }


def _device(processes: int) -> str:
    return "cuda" if count_gpus() >= processes else "cpu"


def _print_changes(console: Console, changes: list[Change]) -> None:
    if changes:
        listed = ", ".join(f"{key} {before} -> {after}" for key, before, after in changes)
        console.print(f"made small (--full-size keeps all): {listed}")


def _print_scale(console: Console, rounding: dict[str, Any]) -> None:
    console.print(
        f"allowed: {MARGIN:.0f} x (the error of one fp32 process + the typical one x the reference), against one "
        f"process in fp64; optim.eps = {rounding['eps']:.1e}, see `pretrain.verify`"
    )


def _print_quantities(console: Console, verdict: Verdict) -> None:
    """Each quantity's relative error, what is allowed, and the one in percent of the other."""
    done = verdict.comparisons
    first = next(iter(done.values()))
    starts = [row for row in first.rows["initial weights"] if row.off]
    lines: list[tuple[str, ...]] = [
        ("", "error", "allowed", ""),
        ("initial weights", f"{len(starts)} differ" if starts else "equal", "", ""),
    ]
    for kind in ("losses", "norms"):
        for optimizer, comparison in done.items():
            lines += [(f"{row.name}, {optimizer}", *_cells(row)) for row in comparison.rows[kind]]
    _print_columns(console, lines)
    groups = {"gradient": first.rows["gradients"]} | {f"{name} update": c.rows["weights"] for name, c in done.items()}
    lines = [("", *(cell for group in groups for cell in (group, "allowed", "")))]
    for rows in zip(*groups.values(), strict=True):
        lines.append((rows[0].name, *(cell for row in rows for cell in _cells(row))))
    _print_columns(console, lines)


def _print_columns(console: Console, lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        console.print(text, markup=False, style="red" if " off" in text else None)
    console.print()


def _cells(row: Row) -> tuple[str, str, str]:
    if row.distance.norm <= row.allowed and row.allowed:
        return ("zero", "", f"{row.share:.0%}") if not row.off else ("not zero", "", "off")
    scale = row.distance.norm or 1.0
    used = f"{row.share:.0%}"
    if row.off:
        used = "off" if row.factor is None else f"off, x {describe_factor(row.factor)}"
    return f"{row.distance.error / scale:.1e}", f"{row.allowed / scale:.1e}", used


def _print_summary(console: Console, verdicts: list[Verdict]) -> None:
    """A line for each layout, failed ones first; the largest error of each kind in percent of what is allowed."""
    lines: list[tuple[str, ...]] = [("layout", *KINDS, "verdict")]
    for verdict in sorted((v for v in verdicts if not v.refused), key=lambda v: v.agrees):
        cells = []
        for kind in KINDS:
            worst = max((row.share for c in verdict.comparisons.values() for row in c.rows[kind]), default=None)
            cells.append("" if worst is None else "equal" if not worst else f"{worst:.0%}" if worst <= 1 else "off")
        lines.append((describe_layout(verdict.parallel), *cells, verdict.word))
    _print_columns(console, lines)
    for verdict in verdicts:
        if verdict.refused:
            console.print(f"not possible: {describe_layout(verdict.parallel)}: {verdict.refused}", markup=False)


def _print_end(console: Console, verdicts: list[Verdict]) -> int:
    tried = [verdict for verdict in verdicts if not verdict.refused]
    failed = [verdict for verdict in tried if verdict.failed]
    if not failed:
        console.print(f"{len(tried)} of {len(tried)} layouts agree with one process")
        return 0
    alike: dict[tuple[str, ...], list[str]] = {}
    for verdict in failed:
        alike.setdefault(tuple(verdict.diagnosis()), []).append(describe_layout(verdict.parallel))
    for lines, layouts in alike.items():
        console.print("; ".join(layouts), style="bold red")
        for line in lines:
            console.print(f"  {line}", markup=False)
    console.print(f"\n{len(failed)} of {len(tried)} layouts differ from one process")
    if len(tried) > 1:
        agreeing = [features(verdict.parallel) for verdict in tried if verdict.agrees]
        only, shared = suspects([features(verdict.parallel) for verdict in failed], agreeing)
        if only:
            console.print(f"All that differ have {', '.join(only)}, and none that agrees has.")
        elif shared:
            console.print(f"All that differ have {', '.join(shared)}; some that agree have it too.")
    return 1

"""pretrain checkpoint merge, average, ema, cast, prune-optimizer"""

import argparse
from pathlib import Path

import torch

from checkpoints.manifest import Manifest, Progress
from checkpoints.state import saved_state
from checkpoints.store import CheckpointStore
from checkpoints.surgery.merge import METHODS, Merging, merge
from checkpoints.surgery.rewrite import rewrite
from checkpoints.surgery.target import Target, origin, origins
from launch.commands.convert import DTYPES, find_checkpoint
from launch.commands.derive import configure, make_run, place_in_data
from parallel.materialise import generator_for
from pretrain.config import RunConfig, flat_config, load_run_config
from pretrain.models import FAMILIES

OPTIONS = tuple(dict.fromkeys(name for options in METHODS.values() for name in options))
# Keys of the model that say how it is trained, not what it computes.
OF_TRAINING = ("init_std", "balance", "balance_weight", "z_weight", "bias_rate")


def merge_runs(args: argparse.Namespace) -> None:
    """Make a run, at step 0, out of several runs of the same shape."""
    said = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    how = Merging(args.method, len(args.runs), said)
    if how.over_base != (args.base is not None):
        needs = "needs --base, the run that the others were trained on from" if how.over_base else "takes no --base"
        raise ValueError(f"--method {args.method} {needs}")
    found = [find_checkpoint(Path(run), None) for run in args.runs]
    base = find_checkpoint(Path(args.base), None) if args.base is not None else None
    run_dir, first = found[0]
    config = load_run_config(run_dir)
    for other, _ in [*found[1:], *([base] if base else [])]:
        _check_same_model(config, run_dir, load_run_config(other), other)
    settings = how.settings
    weights = settings.pop("weights", [None] * len(found))
    sources = [
        ("merge", {"method": how.method, **settings, "model": number, **({"weight": w} if w is not None else {})}, path)
        for number, ((_, path), w) in enumerate(zip(found, weights, strict=True), start=1)
    ]
    if base is not None:
        sources.insert(0, ("merge", {"method": how.method, "model": "base"}, base[1]))
    lineage = origins(sources)

    def write(target: Target, progress: Progress) -> None:
        paths = [path for _, path in found]
        seed = settings.get("seed", 0)
        merge(paths, base and base[1], target, how, lambda name: generator_for(seed, name), lineage, progress)

    new = configure(run_dir, Path(args.out))
    make_run(run_dir, new, place_in_data(first), write, same_model=True)
    print(f"merged {', '.join(str(path) for _, path in found)} to the run {args.out}, at step 0, by {how.method}")
    _print_next(args.out)


def average(args: argparse.Namespace) -> None:
    """Make a run out of the mean of a run's last checkpoints, at the step of the newest."""
    how = Merging(*(("mean", args.last) if args.decay is None else ("ema", args.last, {"decay": args.decay})))
    run_dir, newest = find_checkpoint(Path(args.run), args.step)
    step = Manifest.read(newest).step
    whole = [i for i in CheckpointStore(newest.parent).list() if i.problem is None and i.step <= step]
    if len(whole) < args.last:
        there = ", ".join(str(info.step) for info in whole)
        raise ValueError(
            f"--last {args.last}: {run_dir} has {len(whole)} whole checkpoints by step {step} (steps {there}); average "
            "fewer, or keep more (checkpoint.keep)"
        )
    paths = [info.path for info in whole[-args.last :]]
    lineage = origins([("average", {"method": how.method, **how.settings}, path) for path in paths])

    def write(target: Target, progress: Progress) -> None:
        merge(paths, None, target, how, lambda name: generator_for(0, name), lineage, progress)

    config = configure(run_dir, Path(args.out))
    make_run(run_dir, config, saved_state(newest), write, step=step, same_model=True)
    steps = ", ".join(str(info.step) for info in whole[-args.last :])
    print(f"averaged steps {steps} of {run_dir} to the run {args.out}, at step {step}, without optimizer state")
    _print_next(args.out)


def cast(args: argparse.Namespace) -> None:
    """Make a run whose model has other types, at the same step; optimizer state and buffers stay as they are."""
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    _rewrite(run_dir, checkpoint, args.out, args.dtype)
    print(f"cast {checkpoint} to {args.dtype}: the run {args.out}, at step {Manifest.read(checkpoint).step}")
    _print_next(args.out)


def prune_optimizer(args: argparse.Namespace) -> None:
    """Make a run without optimizer state, at the same step."""
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    _rewrite(run_dir, checkpoint, args.out, None)
    manifest = Manifest.read(checkpoint)
    new = Manifest.read(Path(args.out) / "checkpoints" / checkpoint.name)
    print(
        f"copied {checkpoint} without optimizer state to the run {args.out}, at step {manifest.step}: "
        f"{manifest.num_bytes / 1e6:,.1f} MB -> {new.num_bytes / 1e6:,.1f} MB; training on starts a fresh optimizer"
    )
    _print_next(args.out)


def ema(args: argparse.Namespace) -> None:
    """Make a run whose weights are the moving average that was kept beside a run's, at the same step."""
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    lineage = origin("ema", {"decay": load_run_config(run_dir).optim.ema}, checkpoint)

    def write(target: Target, progress: Progress) -> None:
        rewrite(checkpoint, target, lineage, progress=progress, averaged=True)

    step = Manifest.read(checkpoint).step
    make_run(run_dir, configure(run_dir, Path(args.out)), saved_state(checkpoint), write, step=step, same_model=True)
    print(f"made the run {args.out}, at step {step}, of the moving average in {checkpoint}, without optimizer state")
    _print_next(args.out)


def _rewrite(run_dir: Path, checkpoint: Path, out: str, dtype: str | None) -> None:
    config = configure(run_dir, Path(out))
    with torch.device("meta"):
        buffers = {name for name, _ in FAMILIES[config.model.family].build(config.model).named_buffers()}
    lineage = origin("cast", {"dtype": dtype}, checkpoint) if dtype else origin("prune-optimizer", {}, checkpoint)

    def write(target: Target, progress: Progress) -> None:
        rewrite(checkpoint, target, lineage, DTYPES[dtype] if dtype else None, buffers, progress)

    optimizer = checkpoint if dtype else None
    step = Manifest.read(checkpoint).step
    make_run(run_dir, config, saved_state(checkpoint), write, step=step, optimizer=optimizer, same_model=True)


def _check_same_model(config: RunConfig, where: Path, other: RunConfig, other_where: Path) -> None:
    """Raises ValueError where two runs' models are not computed alike."""
    ours, theirs = (flat_config(each) for each in (config, other))
    for key in dict.fromkeys([*ours, *theirs]):
        may = not key.startswith("model.") or key.rpartition(".")[2] in OF_TRAINING
        if not may and ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{key} = {theirs.get(key)} in {other_where}, but {ours.get(key)} in {where}: only models of the same "
                "shape and settings can be merged"
            )


def _print_next(out: str) -> None:
    print(f"train it with: pretrain run {Path(out) / 'config.toml'}")

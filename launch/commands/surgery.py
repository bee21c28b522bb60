"""pretrain checkpoint upcycle, prune"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.manifest import Progress
from checkpoints.surgery import experts as surgery
from checkpoints.surgery.experts import SparseLayer, Upcycling
from checkpoints.surgery.methods import Mixing
from checkpoints.surgery.target import Target, origin
from launch.commands.convert import find_checkpoint
from launch.commands.derive import configure, make_run, place_in_data
from parallel.materialise import generator_for
from pretrain.config import RunConfig, flat_config, load_run_config, resolve
from pretrain.metrics import step_of
from pretrain.models import FAMILIES


def upcycle(args: argparse.Namespace) -> None:
    """Make a run whose feed-forward layers are experts, at step 0, out of a dense run."""
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    how = Upcycling(args.method, args.noise, args.noise_share, args.router == "zero")
    dense = load_run_config(run_dir)
    _family(dense)
    if getattr(dense.model, "moe", None) is not None:
        raise ValueError(f"{run_dir} has experts already: give a dense run, or see `pretrain checkpoint prune`")
    config = _upcycled(run_dir, dense, Path(args.out), args.overrides, how)
    moe = config.model.moe
    with torch.device("meta"):
        model: Any = FAMILIES[config.model.family].build(config.model)
    seed = config.run.seed
    arguments = {
        "method": how.method,
        **({"noise": how.noise, "noise_share": how.share} if how.noise else {}),
        **{"router": args.router, "experts": moe.experts, "top_k": moe.top_k, "ffn": moe.ffn, "scale": moe.scale},
        "seed": seed,
    }
    lineage = origin("upcycle", arguments, checkpoint)

    def write(target: Target, layers: list[SparseLayer], progress: Progress) -> None:
        surgery.upcycle(
            checkpoint,
            target,
            layers,
            how,
            fill=lambda name, tensor: model.init_parameter(name, tensor, generator_for(seed, name)),
            draw=lambda name: generator_for(seed, f"upcycle {name}"),
            lineage=lineage,
            progress=progress,
        )

    _make_run(run_dir, checkpoint, config, dense, write)
    why = _mixing(config, how).loss_of(how.method, how.noise > 0, moe.scale)
    print(
        f"upcycled {checkpoint} to the run {args.out}, at step 0: {moe.experts} experts of width {moe.ffn}, top_k = "
        f"{moe.top_k}, scale = {moe.scale:g}, by {how.method}"
    )
    print(
        f"the output is not exactly the dense model's: {why}"
        if why
        else "the output is exactly the dense model's, up to rounding"
    )
    print(f"train it with: pretrain run {Path(args.out) / 'config.toml'}")


def prune(args: argparse.Namespace) -> None:
    """Make a run with the `--keep` most used experts of each layer, at step 0."""
    run_dir, checkpoint = find_checkpoint(Path(args.run), args.step)
    before = load_run_config(run_dir)
    moe = getattr(before.model, "moe", None)
    if moe is None:
        raise ValueError(f"{run_dir} has no experts: give a run with model.moe, or see `pretrain checkpoint upcycle`")
    if not 1 <= args.keep < moe.experts:
        raise ValueError(f"--keep {args.keep}: must be at least 1 and below model.moe.experts = {moe.experts}")
    if args.keep % moe.groups:
        raise ValueError(
            f"--keep {args.keep}: must be a multiple of model.moe.groups = {moe.groups}, as each group keeps as many"
        )
    if args.keep < moe.top_k and not any(word.startswith("model.moe.top_k=") for word in args.overrides):
        raise ValueError(
            f"--keep {args.keep} is below model.moe.top_k = {moe.top_k}; keep more, or add model.moe.top_k={args.keep}"
        )
    config = configure(run_dir, Path(args.out), args.overrides, [f"model.moe.experts={args.keep}"])
    _check_same_model(before, config, ("experts", "ffn", "first_dense", "every", "shared_ffn", "shared_gate", "bias"))
    layers = _layers(config)
    if args.by == "load":
        usage = _logged_load(run_dir, origin("", {}, checkpoint)[-1].step, len(layers), moe.experts)
    else:
        usage = surgery.router_norms(checkpoint, layers)
    keep = [surgery.largest(each, args.keep, moe.groups) for each in usage]
    lineage = origin("prune", {"by": args.by, "experts": keep}, checkpoint)

    def write(target: Target, layers: list[SparseLayer], progress: Progress) -> None:
        surgery.prune(checkpoint, target, layers, keep, lineage, progress)

    _make_run(run_dir, checkpoint, config, before, write)
    print(f"pruned {checkpoint} to the run {args.out}, at step 0: {args.keep} of {moe.experts} experts, by {args.by}")
    for layer, kept in zip(layers, keep, strict=True):
        print(f"  {layer.router.removesuffix('.weight')}: kept {', '.join(map(str, kept))}")


def _upcycled(run_dir: Path, dense: RunConfig, out: Path, overrides: list[str], how: Upcycling) -> RunConfig:
    """The new run's config; the experts' width and scale follow from the method."""
    config, origins = resolve(str(run_dir / "config.toml"), overrides)
    moe = config.model.moe
    if moe is None:
        raise ValueError("model.moe is not set: add model.moe.experts=8 model.moe.top_k=2, or what you want")
    if moe.shared_ffn:
        raise ValueError(f"model.moe.shared_ffn = {moe.shared_ffn}: upcycling makes routed experts only; leave it at 0")
    if how.zero_router and moe.top_k < moe.experts:
        raise ValueError(
            f"--router zero: every token would take the same {moe.top_k} of {moe.experts} experts; set model.moe.top_k "
            f"= {moe.experts}, or take --router normal"
        )
    if how.zero_router and how.method == "copy" and not how.noise:
        raise ValueError("--router zero: copies would never come apart; add --noise, or take --router normal")
    width = how.width(config.model.ffn, moe.experts)
    if "model.moe.ffn" in origins and moe.ffn != width:
        raise ValueError(
            f"model.moe.ffn = {moe.ffn}: --method {how.method} makes experts of width {width}; leave it out"
        )
    derived = [f"model.moe.ffn={width}"]
    if "model.moe.scale" not in origins:
        derived.append(f"model.moe.scale={_mixing(config, how).scale(how.method)!r}")
    config = configure(run_dir, out, overrides, derived)
    _check_same_model(dense, config)
    return config


def _check_same_model(before: RunConfig, after: RunConfig, fixed: tuple[str, ...] = ()) -> None:
    """Raises ValueError where another key of the model changed than those of its experts, less the `fixed` ones."""
    old, new = (flat_config(config) for config in (before, after))
    for key, value in new.items():
        name = key.removeprefix("model.moe.")
        may = name != key and (name not in fixed or name == "experts")
        if key.startswith("model.") and key != "model.moe" and not may and old.get(key) != value:
            raise ValueError(f"{key} = {value}, but the checkpoint's is {old.get(key)}; leave it out")


def _mixing(config: RunConfig, how: Upcycling) -> Mixing:
    moe = config.model.moe
    by_token = moe.choice == "token"
    return Mixing(
        experts=moe.experts,
        top_k=moe.top_k,
        softmax=moe.scores == "softmax",
        normalized=moe.normalize and by_token,
        whole=not moe.capacity and (by_token or moe.top_k == moe.experts),
        zero_router=how.zero_router,
    )


def _family(config: RunConfig) -> Callable[[Any], Any]:
    feed_forward = FAMILIES[config.model.family].feed_forward
    if feed_forward is None:
        can = ", ".join(name for name, family in FAMILIES.items() if family.feed_forward is not None)
        raise ValueError(f"model.family = {config.model.family!r} has no layers that can become experts: one of {can}")
    return feed_forward


def _layers(config: RunConfig) -> list[SparseLayer]:
    return [SparseLayer(**asdict(names)) for names in _family(config)(config.model)]


def _make_run(
    run_dir: Path,
    checkpoint: Path,
    config: RunConfig,
    before: RunConfig,
    write: Callable[[Target, list[SparseLayer], Progress], None],
) -> None:
    """The new run's folder; `write` fills its checkpoint."""
    old, new = (flat_config(each) for each in (before, config))
    # The cursor counts samples of a stream.
    same_stream = all(old.get(key) == new.get(key) for key in ("run.seed", "data.seq_len", "data.sources"))
    state = place_in_data(checkpoint) if same_stream else {"cursor": 0}
    layers = _layers(config)
    make_run(run_dir, config, state, lambda target, progress: write(target, layers, progress))


def _logged_load(run_dir: Path, step: int, layers: int, experts: int) -> list[Tensor]:
    """Load of each expert [E] for each sparse layer, as the run logged it last by `step`."""
    path = run_dir / "metrics.jsonl"
    found = None
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                at = step_of(line)
                if at is not None and at <= step:
                    found = json.loads(line).get("router_load", found)
    if found is None:
        raise FileNotFoundError(f"{path} has no router_load by step {step}; log it (log.every), or take --by norm")
    usage = torch.tensor(found)
    if usage.shape != (layers, experts):
        raise ValueError(
            f"{path}: router_load has shape {list(usage.shape)}, but the model's is {[layers, experts]}; take --by norm"
        )
    return list(usage)

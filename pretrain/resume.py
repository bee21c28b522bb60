"""Where a run stands, and going on from there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.manifest import Manifest
from checkpoints.retention import find_step
from checkpoints.state import saved_state, set_rng_state
from checkpoints.store import CheckpointStore
from parallel.engine import Engine
from parallel.world import World
from pretrain.config import RunConfig, flat_config, load_run_config
from pretrain.data import check_tokenizer
from pretrain.history import this_start

# What the samples are made by: a place in the data means nothing once it changes. The sources have a history instead.
PLACE = ("run.seed", "data.seq_len", "data.patches", "data.shuffle_shards", "data.pictures.")
FREE = ("data.pictures.broken", "data.pictures.workers")
FROZEN = "optim.freeze"  # says which parameters have optimizer state


@dataclass
class Position:
    """How far the run has got: what a resume needs beside the engine's state."""

    step: int = 0  # optimizer steps taken
    cursor: int = 0  # global index of the next sample
    mixture: list[Any] | None = None  # the history of the data mixture, from the checkpoint


def check_resume(config: RunConfig, store: CheckpointStore, found: int | None) -> None:
    """Raises ValueError or FileNotFoundError where `run.resume` does not allow to go on from step `found`, or, None, to
    start anew.
    """
    if found is None and (broken := store.list()):
        why = broken[-1].problem or f"checksums of step {broken[-1].step} do not match"
        raise ValueError(
            f"{store.folder} has {len(broken)} checkpoints and none is whole ({why}); restore one, or choose another "
            "run.dir to start anew"
        )
    if found is None and config.run.resume == "must":
        raise FileNotFoundError(f'run.resume = "must", but {store.folder} has no whole checkpoint; check run.dir')
    if found is not None and config.run.resume == "never" and not this_start()["restart"]:
        raise ValueError(
            f'run.resume = "never", but {config.run.dir} holds a run at step {found}; choose another run.dir'
        )
    if found is not None and found > config.train.steps:
        raise ValueError(
            f"train.steps = {config.train.steps}, but {config.run.dir} is at step {found} already; raise train.steps "
            "or choose another run.dir"
        )


def resume(store: CheckpointStore, step: int, engine: Engine, world: World, afresh: bool = False) -> Position:
    """Fill the engine from a checkpoint. One without optimizer state (an import), or `afresh` (other parameters are
    trained now), starts a fresh optimizer.
    """
    state = engine.state_dict()
    saved = Manifest.read(find_step(store.folder, step)).tensors["optimizer"]
    averages = {name: tensor for name, tensor in state["optimizer"].items() if name.startswith("ema.")}
    begins = {name for name in averages if name not in saved}
    wanted = {name: tensor for name, tensor in state["optimizer"].items() if name not in begins}
    wanted |= {  # an average that is not kept any more is read and forgotten
        name: torch.empty_like(state["model"][name.removeprefix("ema.")])
        for name in saved
        if name.startswith("ema.") and name not in averages and name.removeprefix("ema.") in state["model"]
    }
    extra = store.load(step, state["model"], wanted if saved and not afresh else None)
    for name in averages if afresh else begins:
        averages[name].copy_(state["model"][name.removeprefix("ema.")])
    engine.load_state_dict(state)
    if len(extra["ranks"]) == world.size and extra["ranks"][world.rank]:
        set_rng_state(extra["ranks"][world.rank]["rng"])
    return Position(extra["step"], extra.get("cursor", 0), extra.get("mixture"))


def meaning(config: RunConfig) -> dict[str, Any]:
    """The settings that a checkpoint counts on, to be saved with it: config.toml is of the last start, which may have
    died before it saved anything, and stays behind where only checkpoints are copied.
    """
    flat = flat_config(config)
    return {key: flat[key] for key in flat if (key.startswith(PLACE) and key not in FREE) or key == FROZEN}


def check_changes(config: RunConfig, store: CheckpointStore, datasets: Any, found: int | None) -> list[str]:
    """Settings that differ from those of the checkpoint of step `found` or else of the last start, one line each.
    Raises ValueError for those that would give the saved position another meaning, and for another tokenizer.
    """
    run_dir = Path(config.run.dir)
    check_tokenizer(config, datasets, run_dir)
    if not found:
        return []
    started = flat_config(load_run_config(run_dir)) if (run_dir / "config.toml").is_file() else {}
    saved = saved_state(find_step(store.folder, found)).get("recipe", {})
    before, after = started | saved, flat_config(config)
    for key in meaning(config):
        if key != FROZEN and key in before and before[key] != after[key]:
            raise ValueError(
                f"{key} = {after[key]}, but {run_dir} was started with {before[key]}, and its place in the data "
                f"counts on that; set it back, or choose another run.dir"
            )
    keys = dict.fromkeys([*before, *after]) if started else saved
    return [f"{k} {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]

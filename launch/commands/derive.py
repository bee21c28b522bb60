"""The folder of a run that is derived from other runs: its config, tokenizer and one checkpoint."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from checkpoints.derived import new_folder
from checkpoints.hf.folder import KEPT
from checkpoints.hf.tokenizer import copy_tokenizer
from checkpoints.manifest import Progress
from checkpoints.state import saved_state
from checkpoints.surgery.target import Target
from launch.commands.convert import native_tensors
from launch.progress import progress_bar
from pretrain.config import RunConfig, load_run_config, resolve, write_config

# What the old run said of itself is not meant for the new one; its remote copies are its own.
FRESH = ["train.stop_at=0", "run.resume=auto", "checkpoint.remote="]


def configure(run_dir: Path, out: Path, overrides: Sequence[str] = (), derived: Sequence[str] = ()) -> RunConfig:
    """The config of the run `out`: that of `run_dir`, with the user's overrides, then what is `derived` from them."""
    if any(word.startswith("run.dir=") for word in overrides):
        raise ValueError(f"run.dir: the new run's folder is {out} already; leave it out")
    tokenizer = run_dir / "tokenizer"
    moved = [f"run.dir={json.dumps(str(out))}"]
    used = load_run_config(run_dir).tokenizer.path
    if used and Path(used).resolve() == tokenizer.resolve():  # an imported run's own
        moved.append(f"tokenizer.path={json.dumps(str(out / 'tokenizer'))}")
    return resolve(str(run_dir / "config.toml"), [*FRESH, *moved, *overrides, *derived])[0]


def place_in_data(checkpoint: Path) -> dict[str, Any]:
    """The state of a run of step 0 that goes on in the data where `checkpoint` was."""
    state = saved_state(checkpoint)
    return {key: state[key] for key in ("cursor", "mixture") if key in state}


def make_run(
    run_dir: Path,
    config: RunConfig,
    state: dict[str, Any],
    write: Callable[[Target, Progress], None],
    *,
    step: int = 0,
    optimizer: Path | None = None,
    same_model: bool = False,
) -> None:
    """The new run's folder: what stands beside `run_dir`'s checkpoints, and a checkpoint that `write` fills.

    step, optimizer: as in `Target`. same_model: the model is of the same shape, so that what was kept from an import of
    it still holds.
    """
    shapes, ties = native_tensors(config.model)
    with new_folder(Path(config.run.dir)) as temp:
        with progress_bar(Console()) as bar:
            total = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
            write(Target(temp / "checkpoints", shapes, ties, state, step, optimizer), bar("writing", total))
        copy_tokenizer(run_dir / "tokenizer", temp / "tokenizer")
        if same_model and (run_dir / KEPT).is_file():
            shutil.copyfile(run_dir / KEPT, temp / KEPT)
        write_config(config, temp / "config.toml")

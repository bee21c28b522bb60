"""A trained model out of a run's folder, in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.store import CheckpointStore
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from parallel.materialise import materialise, named_tensors
from pretrain.config import RunConfig, load_run_config
from pretrain.models import FAMILIES


@dataclass(frozen=True)
class Trained:
    """A run's config, model and the step it was saved at."""

    config: RunConfig
    model: Any
    step: int


def build_model(config: Any, device: torch.device | str = "cpu") -> Any:
    """The model of a `[model]` section, allocated but not initialised."""
    with torch.device("meta"):
        model = FAMILIES[config.family].build(config)
    materialise(model, torch.device(device))
    return model


def load_trained(run_dir: Path, step: int | None = None, device: torch.device | str = "cpu") -> Trained:
    """The model of a run at `step`, or at its newest whole checkpoint.

    Raises FileNotFoundError or ValueError for what is missing, damaged or of another architecture.
    """
    config = load_run_config(run_dir)
    model = build_model(config.model, device).eval()
    tensors, _ = named_tensors(model)
    state = CheckpointStore(run_dir / "checkpoints").load(step, {n: t.detach() for n, t in tensors.items()})
    return Trained(config, model, state["step"])


def run_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer kept with a run."""
    folder = run_dir / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the run has no tokenizer; copy the one its shards were built with there")
    return load_tokenizer(folder)

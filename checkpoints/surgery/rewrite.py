"""One checkpoint written anew: in another type, or without what it does not need."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.manifest import Origin, Progress
from checkpoints.surgery.target import Target, check_same_shapes, narrowed, write_tensors
from checkpoints.tensors import open_checkpoint

AVERAGE = "ema."  # what the optimizer's state calls a parameter's moving average, before its name


def rewrite(
    source: Path,
    target: Target,
    lineage: tuple[Origin, ...],
    dtype: torch.dtype | None = None,
    kept: Collection[str] = (),
    progress: Progress | None = None,
    averaged: bool = False,
) -> None:
    """Write the model of a checkpoint again, floating-point tensors in `dtype` (None: as they are), those in `kept` as
    they are. averaged: of what was trained, the moving average that its optimizer state holds.

    Raises FileNotFoundError or ValueError (one line): `source` is not whole, does not fit, or holds a number that is
    too large for `dtype`.
    """
    files = open_checkpoint(source)
    check_same_shapes(files, target.shapes)
    averages = open_checkpoint(source, "optimizer") if averaged else None
    if averages is not None and not any(name.startswith(AVERAGE) for name in averages):
        raise ValueError(f"{source} holds no moving average of the weights: train with optim.ema to have one")
    dtypes = {name: files.infos[name].dtype for name in target.shapes}
    if dtype is not None:
        dtypes |= {name: dtype for name, own in dtypes.items() if own.is_floating_point and name not in kept}

    def make(name: str) -> Tensor:
        if averages is not None and AVERAGE + name in averages:
            return averages.read(AVERAGE + name)
        return narrowed(name, files.read(name), dtypes[name])

    write_tensors(target, dtypes, make, lineage, progress)

"""The checkpoint that is derived: what it must hold, and its tensors made and written one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from checkpoints.derived import new_checkpoint
from checkpoints.manifest import Manifest, Origin, Progress
from checkpoints.tensors import TensorFiles, TensorInfo

Shapes = Mapping[str, tuple[int, ...]]
Draw = Callable[[str], Generator]  # name -> a generator of its own


@dataclass(frozen=True)
class Target:
    """The checkpoint to write: of `step`, in the folder `checkpoints`, of a model with these tensors and ties.

    optimizer: checkpoint whose optimizer state comes along as it is; None: the new one has none.
    """

    checkpoints: Path
    shapes: Shapes
    ties: dict[str, str]
    state: dict[str, Any]
    step: int = 0
    optimizer: Path | None = None


def origin(operation: str, arguments: dict[str, Any], source: Path) -> tuple[Origin, ...]:
    """The lineage of what is derived from the checkpoint `source`."""
    return origins([(operation, arguments, source)])


def origins(sources: list[tuple[str, dict[str, Any], Path]]) -> tuple[Origin, ...]:
    """The lineage of what is derived from several checkpoints: (operation, arguments, checkpoint) of each.

    What the sources were derived from comes first, once where they share it.
    """
    manifests = [Manifest.read(source) for _, _, source in sources]
    found: list[Origin] = []
    for manifest in manifests:
        found += [older for older in manifest.lineage if older not in found]
    for (operation, arguments, source), manifest in zip(sources, manifests, strict=True):
        found.append(Origin(operation, arguments, str(source), manifest.step, manifest.digest))
    return tuple(found)


def check_sources(files: TensorFiles, wanted: list[str], of: Mapping[str, str]) -> None:
    """Raises ValueError unless what is `wanted` is made of all that `files` hold. of: its name -> that in the files."""
    used = {of[name] for name in wanted}
    if missing := sorted(used - set(files)):
        raise ValueError(f"{files.where} lacks the tensor '{missing[0]}': use the config that it was trained with")
    if extra := sorted(set(files) - used):
        raise ValueError(f"{files.where} has the tensor '{extra[0]}', for which the new model has no place")


def check_same_shapes(files: TensorFiles, shapes: Shapes) -> None:
    """Raises ValueError unless `files` hold exactly these tensors."""
    check_sources(files, list(shapes), {name: name for name in shapes})
    for name, shape in shapes.items():
        if (found := files.infos[name].shape) != tuple(shape):
            raise ValueError(
                f"{files.where}: tensor '{name}' has shape {list(found)}, not {list(shape)}: only models of the same "
                "shape can be combined"
            )


def write_tensors(
    target: Target,
    dtypes: Mapping[str, torch.dtype],
    make: Callable[[str], Tensor],
    lineage: tuple[Origin, ...],
    progress: Progress | None,
) -> None:
    """Write what `make` gives for each of the target's names; progress: called with the bytes just written."""
    infos = {name: TensorInfo(tuple(shape), dtypes[name]) for name, shape in target.shapes.items()}
    with new_checkpoint(
        target.checkpoints,
        infos,
        target.ties,
        target.state,
        lineage,
        step=target.step,
        optimizer=target.optimizer,
    ) as writer:
        for name, info in infos.items():
            tensor = make(name)
            if tuple(tensor.shape) != info.shape:
                raise ValueError(f"tensor '{name}' would have shape {list(tensor.shape)}, not {list(info.shape)}")
            writer.write(name, tensor)
            del tensor  # before the next one comes
            if progress is not None:
                progress(info.num_bytes)


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises ValueError where a number that it holds is too large for it."""
    result = tensor.to(dtype)
    if result is not tensor and dtype.is_floating_point and not bool(result.isfinite().all()):
        largest = float(tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
        if largest > torch.finfo(dtype).max:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"tensor '{name}' holds {largest:.3g}, too large for {kind}: take --dtype bf16 or fp32")
    return result

"""Several checkpoints of the same shape made into one, a tensor at a time.

Memory: two to six of the largest tensor in fp32, whatever the number of models and their size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.manifest import Origin, Progress
from checkpoints.surgery import arithmetic
from checkpoints.surgery.arithmetic import Read
from checkpoints.surgery.target import Draw, Target, check_same_shapes, narrowed, write_tensors
from checkpoints.tensors import TensorFiles, open_checkpoint

# Method -> the options that it takes, and what they are where nothing is said. None: 1 for each model.
METHODS: dict[str, dict[str, Any]] = {
    "mean": {"weights": None},
    "ema": {"decay": 0.9},
    "slerp": {"t": 0.5},
    "task": {"weights": None, "scale": 1.0},
    "ties": {"weights": None, "scale": 1.0, "keep": 0.2},
    "dare": {"weights": None, "scale": 1.0, "drop": 0.9, "seed": 1},
}
OVER_BASE = ("task", "ties", "dare")
SIGNED = ("task", "dare")  # weights below 0 take away what a model has learned
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "decay": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "t": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "keep": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "drop": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
}


@dataclass(frozen=True)
class Merging:
    """How `models` checkpoints become one: `method`, one of METHODS, and what was said of its options.

    weights: one a model; of their sum in a mean, factors of tau else. scale: factor of the whole difference from the
    base. decay: share that the average keeps when the next model comes, oldest first. t: how far from the first to the
    second. keep: share of tau that stays. drop: probability with which an element of tau goes. seed: of that.
    """

    method: str
    models: int
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method} is unknown: one of {', '.join(METHODS)}")
        known = METHODS[self.method]
        if strange := [name for name in self.options if name not in known]:
            takes = ", ".join(f"--{name}" for name in known)
            raise ValueError(f"--{strange[0]} is not for --method {self.method}, which takes {takes}")
        least = 1 if self.over_base else 2
        if self.models < least or (self.method == "slerp" and self.models != 2):
            needs = "exactly 2" if self.method == "slerp" else f"at least {least}"
            raise ValueError(f"--method {self.method} needs {needs} models, but {self.models} were given")
        for name, (allowed, words) in LIMITS.items():
            if name in self.options and not allowed(self.options[name]):
                raise ValueError(f"--{name} {self.options[name]:g}: must be {words}")
        weights = self.options.get("weights")
        if weights is not None and len(weights) != self.models:
            raise ValueError(f"--weights has {len(weights)} numbers, but {self.models} models were given: one for each")
        if weights is not None and self.method not in SIGNED and (min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(f"--weights {' '.join(f'{w:g}' for w in weights)}: must be at least 0, and not all 0")

    @property
    def over_base(self) -> bool:
        return self.method in OVER_BASE

    @property
    def settings(self) -> dict[str, Any]:
        """All options of the method, said or not."""
        found = {**METHODS[self.method], **self.options}
        if "weights" in found and found["weights"] is None:
            found["weights"] = [1.0] * self.models
        return found

    def make(self, reads: Sequence[Read], base: Read | None, draw: Draw, name: str) -> Tensor:
        """The merged tensor called `name`; `reads` and `base` give the models' and the base's."""
        said = self.settings
        if self.method == "mean":
            return arithmetic.running_mean(reads, arithmetic.mean_shares(said["weights"]))
        if self.method == "ema":
            return arithmetic.running_mean(reads, [1 - said["decay"]] * len(reads))
        if self.method == "slerp":
            return arithmetic.slerp(reads, said["t"])
        assert base is not None
        start, weights, scale = base(), said["weights"], said["scale"]
        if self.method == "task":
            return arithmetic.task_arithmetic(start, reads, weights, scale)
        if self.method == "ties":
            return arithmetic.ties(start, reads, weights, scale, said["keep"])
        generators = [draw(f"dare {number} {name}") for number in range(len(reads))]
        return arithmetic.dare(start, reads, weights, scale, said["drop"], generators)


def merge(
    sources: Sequence[Path],
    base: Path | None,
    target: Target,
    how: Merging,
    draw: Draw,
    lineage: tuple[Origin, ...],
    progress: Progress | None = None,
) -> None:
    """Write the checkpoints `sources`, of the same shape, as one. base: what the methods OVER_BASE start from.

    Types are those of the first source; what is no floating-point number must be equal in all.
    draw: gives each tensor a generator. Raises FileNotFoundError or ValueError (one line): a source is not whole, or of
    another shape.
    """
    files = [open_checkpoint(source) for source in sources]
    start = None if base is None else open_checkpoint(base)
    everything = files if start is None else [*files, start]
    for each in everything:
        check_same_shapes(each, target.shapes)
    dtypes = {name: files[0].infos[name].dtype for name in target.shapes}

    def make(name: str) -> Tensor:
        if not dtypes[name].is_floating_point:
            return _same(everything, name)
        reads = [partial(_read, each, name) for each in files]
        read_base = None if start is None else partial(_read, start, name)
        return narrowed(name, how.make(reads, read_base, draw, name), dtypes[name])

    write_tensors(target, dtypes, make, lineage, progress)


def _read(files: TensorFiles, name: str) -> Tensor:
    """In fp32, fp64 as it is."""
    tensor = files.read(name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same(files: Sequence[TensorFiles], name: str) -> Tensor:
    first = files[0].read(name)
    for other in files[1:]:
        if not other.holds(name, first):
            raise ValueError(f"{other.where}: '{name}' holds whole numbers other than those of {files[0].where}")
    return first

"""Comparing a layout with one process: how far apart they may be, where they differ first, and what that looks like.

Everything is measured against one process in fp64. What rounding alone does is measured too, by one process in fp32:

    error(x)    2-norm of x - x_fp64
    typical     median of error(x_fp32) / |x_fp64| over all tensors
    allowed(x)  MARGIN * (error(x_fp32) + typical * |x_fp64|)

A layout adds the same terms in another order, so its rounding errors are of the size of one process's: each quantity's
own conditioning is in error(x_fp32), also of gradients that are nothing but rounding (a key's bias under softmax). The
second term is there since a single number, or a short vector, may be right by luck. MARGIN leaves room for the
difference between two draws of such errors; with a typical relative error of 4e-7 a gradient that is wrong by 1e-5 of
itself is found, and the bugs of distributed training (factors of 2, missing terms) are wrong by 1e-2 and more.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

MARGIN = 16.0
FIRST = "of step 1"  # in names of numbers: gradients are those of this step too
SAME = 1e-3  # how close a factor must be to 2, 1/2, a degree, to be called that

Sizes = Mapping[str, "Distance"]  # name -> how far from the reference


@dataclass(frozen=True)
class Distance:
    """Of a tensor from its reference, in three sums over its elements, all fp64.

    square: of the reference's squares. dot: of products. own: of the tensor's squares. error: 2-norm of the difference.
    """

    error: float
    dot: float
    own: float
    square: float

    @property
    def norm(self) -> float:
        """2-norm of the reference."""
        return math.sqrt(self.square)

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.square else (math.inf if self.error else 0.0)

    @property
    def factor(self) -> float:
        """The number by which the reference is multiplied to come closest to the tensor."""
        return self.dot / self.square if self.square else math.nan

    @property
    def unscaled(self) -> float:
        """2-norm of what is left of the difference once the reference is multiplied by `factor`."""
        return math.sqrt(max(self.own - self.dot * self.factor, 0.0)) if self.square else self.error

    @classmethod
    def of(cls, value: Tensor | float, reference: Tensor | float) -> "Distance":
        """A tensor, or a number, against its reference."""
        if isinstance(value, float) or isinstance(reference, float):
            a, b = float(value), float(reference)
            return cls(abs(a - b), a * b, a * a, b * b)
        x, y = value.detach().double().flatten().cpu(), reference.double().flatten().cpu()
        return cls(float((x - y).norm()), float(x @ y), float(x @ x), float(y @ y))


@dataclass(frozen=True)
class Row:
    """One line of the table: a quantity in a layout. ranks: those that are off, where others that hold it too are not.
    held: whether any rank has it.
    """

    name: str
    distance: Distance
    allowed: float
    ranks: tuple[int, ...] = ()
    held: bool = True

    @property
    def off(self) -> bool:
        return not self.distance.error <= self.allowed  # true for NaN

    @property
    def share(self) -> float:
        """Error in units of what is allowed."""
        if not self.off:
            return self.distance.error / self.allowed if self.allowed else 0.0
        return self.distance.error / self.allowed if self.allowed else math.inf

    @property
    def factor(self) -> float | None:
        """By which the quantity is off, where it is a multiple of the reference and nothing else."""
        rest = max(self.allowed, SAME * self.distance.error)
        return self.distance.factor if self.off and self.distance.square and self.distance.unscaled <= rest else None


def typical_error(rounding: Sizes) -> float:
    """Median relative error of tensors in one fp32 process; those whose reference is zero left out."""
    found = [distance.relative for distance in rounding.values() if distance.square]
    return median(found) if found else 0.0


def compare(by_rank: Sequence[Sizes], rounding: Sizes, typical: float) -> list[Row]:
    """A row for each quantity in the order of `rounding`, with the distance of the rank that is furthest off. A
    quantity that no rank has counts as zeros.
    """
    rows = []
    for name, alone in rounding.items():
        allowed = MARGIN * (alone.error + typical * alone.norm)
        held = {rank: sizes[name] for rank, sizes in enumerate(by_rank) if name in sizes}
        worst = max(held.values(), key=lambda d: d.error if d.error == d.error else math.inf, default=None)
        if worst is None:
            worst = Distance(alone.norm, 0.0, 0.0, alone.square)
        ranks = tuple(rank for rank, distance in held.items() if not distance.error <= allowed)
        rows.append(Row(name, worst, allowed, () if len(ranks) == len(held) else ranks, bool(held)))
    return rows


@dataclass(frozen=True)
class Layout:
    """What a diagnosis needs to know of a layout. degrees: axis -> processes; tied: names that several modules use."""

    degrees: Mapping[str, int]
    accumulation: int = 1
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All rows of one layout, by kind: "initial weights", "losses", "gradients", "norms", "weights"."""

    layout: Layout
    rows: Mapping[str, list[Row]]

    def off(self, kind: str) -> list[Row]:
        return [row for row in self.rows[kind] if row.off]

    @property
    def agrees(self) -> bool:
        return not any(self.off(kind) for kind in self.rows)

    @property
    def share(self) -> float:
        """The largest error of any quantity in units of what is allowed."""
        return max((row.share for rows in self.rows.values() for row in rows), default=0.0)

    def diagnosis(self) -> list[str]:
        """What is wrong, most telling first: the first quantity that is off in the order of the model, by what factor,
        and the usual cause of such a picture. Nothing where all agree.
        """
        if lost := [row.name for row in self.rows["initial weights"] if not row.held]:
            return [
                f"{_names(lost)}: on no process, so it does not run: each layer must be in one pipeline stage. All "
                "else follows from that."
            ]
        if starts := self.off("initial weights"):
            return [
                f"{starts[0].name} is the first of {len(starts)} parameters that start with other values"
                f"{_on(starts[0])}: an initial value must be a function of the seed and the parameter's name alone, so "
                "look for another seed on a process, or a part drawn on its own. All else follows from that."
            ]
        gradients, losses = self.off("gradients"), self.off("losses")
        if not gradients and self.off("weights"):  # what later steps show follows from the weights
            losses = [row for row in losses if FIRST in row.name]
        lines = []
        if gradients:
            lines.append(self._first(gradients))
            lines += self._factors(gradients)
            lines += self._missing(gradients)
        if losses:
            lines.append(self._of_loss(losses, bool(gradients)))
        elif gradients:
            lines.append("The losses agree: the forward pass is right, look at backward and the sums of gradients.")
        if not gradients and not losses:
            lines += self._later()
        return lines

    def _first(self, gradients: list[Row]) -> str:
        first = gradients[0]
        how = f"is {describe_factor(first.factor)} times what it should be" if first.factor is not None else (
            f"is off by {first.distance.relative:.1e} of itself and no multiple of what it should be"
        )  # fmt: skip
        count = f"the first of {len(gradients)} gradients that are off, of {len(self.rows['gradients'])}"
        return f"{first.name}: its gradient{_on(first)} {how} ({count})."

    def _factors(self, gradients: list[Row]) -> list[str]:
        by_factor: dict[float, list[Row]] = {}
        for row in gradients:
            if row.factor is not None and row.distance.own:
                key = next((f for f in by_factor if math.isclose(f, row.factor, rel_tol=2 * SAME)), row.factor)
                by_factor.setdefault(key, []).append(row)
        lines = []
        for factor, rows in by_factor.items():
            every = len(rows) == len([row for row in self.rows["gradients"] if row.distance.norm > row.allowed])
            who = "Every gradient is" if every else f"{_names(row.name for row in rows)}:"
            lines.append(f"{who} {describe_factor(factor)} times: {self.cause(factor)}.")
        return lines

    def _missing(self, gradients: list[Row]) -> list[str]:
        lines = []
        zero = [row.name for row in gradients if not row.distance.own]
        if zero:
            lines.append(f"No gradient at all: {_names(zero)}: does not run, or is cut off from the loss.")
        rest = [row for row in gradients if row.distance.own and row.factor is None]
        if rest and all(row.name in self.layout.tied for row in rest):
            lines.append(
                f"{_names(row.name for row in rest)} is used twice (embedding and head share it): the gradients of "
                "both uses must be added once, between first and last pipeline stage where they are apart."
            )
        return lines

    def _of_loss(self, losses: list[Row], with_gradients: bool) -> str:
        first, degrees = losses[0], self.layout.degrees
        relative = f"off by {first.distance.relative:.1e} of itself"
        factor = first.distance.factor
        text = f"{first.name} is {relative} (factor {describe_factor(factor)})"
        if not with_gradients:
            text += ", while the gradients agree: what is reported is not what is differentiated"
        if known := self.cause(factor, of="the loss", fallback=""):
            return f"{text}: {known}."
        if not with_gradients:
            return f"{text}."
        hints = []
        if degrees.get("cp", 1) > 1:
            hints.append("under cp: positions, mask and targets of each part must be those of its own tokens")
        if degrees.get("pp", 1) > 1:
            hints.append("under pp: each layer must run once, in order, on the micro-batch that the stage before had")
        if degrees.get("tp", 1) > 1:
            hints.append("under tp: partial results must be summed, and heads meet their own keys")
        if not hints:
            hints.append("each process must read its own part of the batch, and the loss count each target once")
        return f"{text}: the forward pass computes another function; {'; '.join(hints)}."

    def _later(self) -> list[str]:
        norms = [row for row in self.off("norms") if FIRST in row.name or not self.off("weights")]
        if norms:
            row = norms[0]
            return [
                f"{row.name} is {describe_factor(row.distance.factor)} times what it should be while every gradient "
                "agrees: some elements are counted on several processes, or on none."
            ]
        lines = []
        unlearned = {row.name for row in self.rows["gradients"] if not row.distance.norm}
        for kind in self.rows:
            if kind.startswith("weights") and (rows := self.off(kind)):
                if states := [row for row in rows if row.name in unlearned]:
                    lines.append(
                        f"{states[0].name}: a state without a gradient, moved by what a step saw, is off"
                        f"{_on(states[0])}: its update must be computed from the global batch, alike on all processes."
                    )
                    continue
                row = rows[0]
                lines.append(
                    f"{row.name}: {kind} are off{_on(row)} by {row.distance.relative:.1e} of the update (the first of "
                    f"{len(rows)}), factor {describe_factor(row.distance.factor)}, while gradients and norm agree: "
                    "look at the optimizer's step on distributed tensors, clipping, and weight decay."
                )
        return lines

    def cause(self, factor: float, of: str = "gradients", fallback: str = "no degree of this layout") -> str:
        """The usual cause of a factor on everything: "exactly 0.5, 1 / parallel.cp: averaged ..."."""
        degrees = {f"parallel.{axis}": degree for axis, degree in self.layout.degrees.items() if degree > 1}
        data = math.prod(self.layout.degrees.get(axis, 1) for axis in ("dp_replicate", "dp_shard"))
        reduced = data * self.layout.degrees.get("cp", 1)
        if data not in degrees.values() and data > 1:
            degrees["dp_replicate x dp_shard"] = data
        if reduced not in degrees.values() and reduced > 1:
            degrees["data and context degrees together"] = reduced
        if self.layout.accumulation > 1:
            degrees["the number of micro-batches"] = self.layout.accumulation
        over = [name for name, degree in degrees.items() if math.isclose(factor, degree, rel_tol=SAME)]
        under = [name for name, degree in degrees.items() if math.isclose(factor * degree, 1, rel_tol=SAME)]
        if over:
            return f"exactly {_or(over)}: {of} summed once too often over it, or divided by a count that lacks it"
        if under:
            return f"exactly 1 / {_or(under)}: {of} averaged over it where they must be summed, or not summed at all"
        if math.isclose(factor, 2, rel_tol=SAME):
            return f"exactly 2: {of} summed twice"
        if math.isclose(factor, 0.5, rel_tol=SAME):
            return f"exactly one half: {of} averaged over two"
        return fallback


def describe_factor(factor: float) -> str:
    """Short where the number is: 2.0, 0.5, 1.00213."""
    near = round(factor, 2)
    return f"{near:.1f}" if math.isclose(factor, near, rel_tol=1e-4) and round(near, 1) == near else f"{factor:.5g}"


def _on(row: Row) -> str:
    return f" on rank {', '.join(map(str, row.ranks))} only" if row.ranks else ""


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _names(names: Iterable[str], most: int = 3) -> str:
    """Layers that are there with all of what is given are named as one; no more than `most` names."""
    given = list(dict.fromkeys(names))
    short: list[str] = []
    for name in given:
        parts = name.split(".")
        block = ".".join(parts[:2]) if len(parts) > 3 and parts[1].isdigit() else name
        inside = [other for other in given if other.startswith(f"{block}.")]
        shown = f"{block}.*" if len(inside) > 2 else name
        if shown not in short:
            short.append(shown)
    more = f" and {len(short) - most} more" if len(short) > most else ""
    return f"{', '.join(short[:most])}{more}"

"""Conversion of tensors as data: rows that say how native tensors stand in a Hugging Face file.

A row reads both ways: `to_hf` and `to_native` come from the same row, so that a mapping is stated once. Names are
templates over the layer, `layers.{i}.mlp.up.weight`; a row stands for all layers that have its native tensors. A
Hugging Face name with `{e}` stands for one name an entry of the native tensor's first dim.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class Row(Protocol):
    """native, hf: the names (templates) on each side. Tensors come and go in their order."""

    @property
    def native(self) -> tuple[str, ...]: ...
    @property
    def hf(self) -> tuple[str, ...]: ...
    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]: ...
    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """shapes: of the native tensors."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name; `transpose` where Hugging Face stores a weight as [in, out].

    keep_dtype: it stays as saved, whatever type an export asks for.
    """

    native_name: str
    hf_name: str
    transpose: bool = False
    keep_dtype: bool = False

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_name,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].t() if self.transpose else tensors[0]]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return self.to_hf(tensors)


@dataclass(frozen=True)
class Concat:
    """Several native tensors as blocks of one, joined along the native `dim`; `transpose` after joining."""

    native: tuple[str, ...]
    hf_name: str
    transpose: bool = False
    dim: int = 0

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        joined = torch.cat(tensors, self.dim)
        return [joined.t() if self.transpose else joined]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        joined = tensors[0].t() if self.transpose else tensors[0]
        return list(joined.split([shape[self.dim] for shape in shapes], self.dim))


@dataclass(frozen=True)
class Stack:
    """A native tensor that Hugging Face stores as one for each entry of its first dim, such as each expert."""

    native_name: str
    hf_name: str

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_name,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].unbind())

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [torch.stack(tensors)]


@dataclass(frozen=True)
class View:
    """The same values in the same order, in another shape: native shape -> Hugging Face's."""

    native_name: str
    hf_name: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_name,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].reshape(self.shape(tuple(tensors[0].shape)))]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [tensors[0].reshape(shapes[0])]


@dataclass(frozen=True)
class PerHead:
    """Native tensors of heads joined head by head: [q | k | v] of the first, then of the second.

    The last native tensor, of a norm over a head's dims, tells how many those are; it goes along as the second of `hf`.
    """

    native: tuple[str, ...]
    hf: tuple[str, str]

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        *parts, norm = tensors
        heads = [part.unflatten(0, (-1, norm.shape[0])) for part in parts]
        return [torch.stack(heads, 1).flatten(0, 2), norm]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        heads = tensors[0].unflatten(0, (-1, len(shapes) - 1, *shapes[-1]))
        return [*(part.flatten(0, 1) for part in heads.unbind(1)), tensors[1]]


@dataclass(frozen=True)
class ChannelsLast:
    """A weight over the pixels of square patches, [H, C * p * p] as (channel, y, x); there as (y, x, channel)."""

    native_name: str
    hf_name: str
    channels: int = 3

    @property
    def native(self) -> tuple[str, ...]:
        return (self.native_name,)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [tensors[0].unflatten(1, (-1, self.channels)).transpose(1, 2).flatten(1)]


@dataclass(frozen=True)
class Under:
    """A row of a model that is part of a larger one: its names with a prefix on each side."""

    row: Row
    native_prefix: str
    hf_prefix: str

    @property
    def native(self) -> tuple[str, ...]:
        return tuple(self.native_prefix + name for name in self.row.native)

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(self.hf_prefix + name for name in self.row.hf)

    @property
    def keep_dtype(self) -> bool:
        return getattr(self.row, "keep_dtype", False)

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.row.to_hf(tensors)

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return self.row.to_native(tensors, shapes)


def under(rows: Iterable[Row], *, native: str = "", hf: str = "") -> tuple[Row, ...]:
    """The rows of a part, with the prefixes that its names have in the whole."""
    return tuple(Under(row, native, hf) for row in rows)


@dataclass(frozen=True)
class Step:
    """A row for one layer: the names it reads and writes, and the shapes they must have."""

    row: Row
    native: tuple[str, ...]
    hf: tuple[str, ...]
    native_shapes: tuple[tuple[int, ...], ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    keep_dtype: bool


def bind(rows: Iterable[Row], shapes: Shapes) -> list[Step]:
    """The steps that convert a model with these native tensors, in the table's order within a layer.

    Raises ValueError (a table that is wrong for this model) unless every native tensor is in exactly one step and
    every Hugging Face name is written once.
    """
    steps: list[Step] = []
    for row in rows:
        keys = {key for template in row.native for name in shapes if (key := match(template, name)) is not None}
        for key in keys:
            native = tuple(template.format(i=key) for template in row.native)
            if absent := [name for name in native if name not in shapes]:
                raise ValueError(f"conversion table: '{native[0]}' comes with '{absent[0]}', which the model lacks")
            meta = [torch.empty(shapes[name], device="meta") for name in native]
            hf_shapes = tuple(tuple(tensor.shape) for tensor in row.to_hf(meta))
            native_shapes = tuple(shapes[name] for name in native)
            hf = tuple(name for template in row.hf for name in _names(template, key, native_shapes[0]))
            keep_dtype = getattr(row, "keep_dtype", False)
            steps.append(Step(row, native, hf, native_shapes, hf_shapes, keep_dtype))
    _check_once([name for step in steps for name in step.native], "native tensor")
    _check_once([name for step in steps for name in step.hf], "Hugging Face tensor")
    if left := shapes.keys() - {name for step in steps for name in step.native}:
        raise ValueError(f"conversion table: it has no row for {first_few(sorted(left))}")
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(steps, key=lambda step: order[step.native[0]])


def _names(template: str, key: str, shape: tuple[int, ...]) -> list[str]:
    if "{e}" not in template:
        return [template.format(i=key)]
    return [template.format(i=key, e=entry) for entry in range(shape[0])]


def match(template: str, name: str) -> str | None:
    """What `{i}` stands for where `name` fits `template` ("" for a template without it), else None. `*`: anything."""
    found = _fields(template, name)
    return None if found is None else found.get("i", "")


def _fields(template: str, name: str) -> dict[str, str] | None:
    """What `{i}` and `{e}` stand for, each once at most, where `name` fits `template`."""
    pattern = re.sub(r"\\{([ie])\\}", r"(?P<\1>\\d+)", re.escape(template)).replace(r"\*", ".*")
    found = re.fullmatch(pattern, name)
    return None if found is None else found.groupdict()


def wrong_experts(rows: Iterable[Row], shapes: Shapes, names: Iterable[str]) -> tuple[int, int] | None:
    """(experts in each layer of a file with these names, experts that the native shapes ask for) where they differ.

    None where the file's layers differ among themselves too, or lack an expert between others: something is missing.
    """
    names, asked = list(names), set[int]()
    found = defaultdict[tuple[str, str], set[int]](set)
    for row in rows:
        template = row.hf[0]
        if "{e}" not in template:
            continue
        asked |= {shape[0] for name, shape in shapes.items() if match(row.native[0], name) is not None}
        for name in names:
            if (there := _fields(template, name)) is not None:
                found[template, there["i"]].add(int(there["e"]))
    counts = {len(experts) if max(experts) + 1 == len(experts) else 0 for experts in found.values()}
    if len(counts) != 1 or len(asked) != 1 or counts in (asked, {0}):
        return None
    return counts.pop(), asked.pop()


def first_few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _check_once(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"conversion table: {what} '{name}' is in two rows")
        seen.add(name)

"""The vocabulary in which a family states how it may be spread over processes."""

import fnmatch
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Plan:
    """Facts of one model that wrapping needs.

    blocks: pattern of the modules that are sharded, recomputed and compiled one by one, such as "layers.*".
    """

    blocks: str


def match_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Modules whose dotted name matches `pattern`, `*` standing for one name between dots, in definition order.

    Raises ValueError when nothing matches: a pattern that has gone stale would silently leave modules unwrapped.
    """
    depth = pattern.count(".")
    found = {
        name: module
        for name, module in model.named_modules()
        if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)
    }
    if not found:
        raise ValueError(f"plan pattern {pattern!r} matches no module of {type(model).__name__}")
    return found

"""The vocabulary in which a family states how it may be spread over processes."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

# How a module's parameters and activations lie over the tensor-parallel processes. The residual stream between
# modules is cut along the sequence (Korthikanti et al. 2022, arXiv:2205.05198).
Style = Literal[
    "gather",  # no parameters of its own: its input is gathered from sequence parts to whole rows
    "column",  # Linear, output features cut: whole rows in, this process's features out
    "part_column",  # as column, but sequence parts in, which it gathers: worth it where they are narrow
    "key_value",  # as column, by key/value head; heads fewer than processes are shared
    "row",  # Linear, input features cut: features in, the sum scattered to sequence parts
    "sequence",  # parameters replicated, works on sequence parts
    "share",  # no parameters of its own: sequence parts gathered for all processes' heads, whose gradients are summed
    "whole",  # parameters replicated; every process does the same with whole rows, and goes on alike
    "collect",  # no parameters of its own: sequence parts in, whole rows out, which every process uses alike
    "position",  # as sequence, but its input is a whole row (of positions, of pixels)
    "head_norm",  # parameters replicated, works on this process's heads
    "width_norm",  # cut along the last dim as the column output that it normalises
    "vocabulary",  # Embedding, rows cut: whole rows of tokens in, sequence parts out
    "experts",  # stacked weights [experts, ...], cut over experts, then as column and row (see `parallel.expert`)
    "head",  # Linear onto the vocabulary, rows cut; the loss uses its weight
]


@dataclass(frozen=True)
class Plan:
    """Facts of one model that wrapping needs; patterns are dotted names in which `*` stands for one name.

    blocks: the modules that are sharded, recomputed and compiled one by one; pipeline stages are cut between them.
    tensor: pattern -> style; every module that has parameters must be covered, and every pattern must match.
    first, last: modules that only the first or the last pipeline stage has.
    attention: the attention cores, whose forward context parallelism replaces.
    tied: name of a parameter -> name of the one it shares storage with.
    heads, kv_heads: number of query heads and of key/value heads of one layer. hidden: width of what goes from block to
    block. routing: modules that decide which rows experts get. experts: in a layer that has them; 0: none. towers:
    further modules that are sharded, recomputed and compiled one by one, of the first pipeline stage. tower_heads:
    numbers of heads there, which tensor parallelism must divide too. largest: name of a parameter -> what its values
    are cut down to after each optimizer step.
    """

    blocks: str
    tensor: Mapping[str, Style] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    attention: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    heads: int = 1
    kv_heads: int = 1
    hidden: int = 1
    routing: str = ""
    experts: int = 0
    towers: tuple[str, ...] = ()
    tower_heads: tuple[int, ...] = ()
    largest: Mapping[str, float] = field(default_factory=dict)


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


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Let the parameters that match a pattern (`vision.*`: `*` is any rest) have neither gradient nor optimizer state.

    Raises ValueError for a pattern that matches no parameter.
    """
    for pattern in patterns:
        named = model.named_parameters(remove_duplicate=False)  # a tied one goes by both its names
        matched = [p for name, p in named if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"optim.freeze: {pattern!r} matches no parameter of {type(model).__name__}; mend it")
        for parameter in matched:
            parameter.requires_grad_(False)


def styles_of(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """Module name -> style, linted both ways. Raises ValueError for a pattern that matches nothing, a module matched
    twice, and a parameter that no pattern covers.
    """
    styles: dict[str, Style] = {}
    for pattern, style in plan.tensor.items():
        for name in match_modules(model, pattern):
            if name in styles:
                raise ValueError(f"plan pattern {pattern!r} matches {name}, which another pattern matches too")
            styles[name] = style
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        if styles.get(owner, "gather") == "gather":
            raise ValueError(f"plan of {type(model).__name__}: no pattern says how {name} lies under parallel.tp")
    return styles

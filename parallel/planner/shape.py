"""A model as the planner sees it: matrices, attention and parameters of each layer, read from the model itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import nn

from parallel.plan import Plan, Style, match_modules, styles_of


@dataclass(frozen=True)
class Parameter:
    """style: how tensor parallelism cuts it, "whole" where nothing does. experts: the first dim counts experts, which
    expert parallelism cuts. Names are those of the model."""

    name: str
    shape: tuple[int, ...]
    style: Style | str = "sequence"
    experts: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Matrix:
    """A product [tokens, inputs] x [inputs, outputs]. active: products a token takes part in (experts: top-k); copies:
    matrices of this shape of which it picks them. group: matrices that share one input."""

    inputs: int
    outputs: int
    style: Style | str
    group: str = ""
    active: int = 1
    copies: int = 1


@dataclass(frozen=True)
class LayerShape:
    """scores: FLOPs a token of attention, forward and backward, for whole sequences: 12 x keys seen x width. qk_dim and
    v_dim: width of a head. norms: applications of a norm over the hidden width. experts, top_k: 0 in a dense layer."""

    parameters: tuple[Parameter, ...]
    matrices: tuple[Matrix, ...]
    norms: int = 2
    heads: int = 0
    kv_heads: int = 0
    qk_dim: int = 0
    v_dim: int = 0
    scores: float = 0.0
    experts: int = 0
    top_k: int = 0

    @property
    def kind(self) -> tuple:
        """Equal for layers that cost the same."""
        return self.matrices, self.norms, self.heads, self.scores, self.experts, tuple(p.shape for p in self.parameters)

    @cached_property
    def matrix_flops(self) -> float:
        """FLOPs a token of the products, forward and backward."""
        return 6.0 * sum(m.inputs * m.outputs * m.active for m in self.matrices)


@dataclass(frozen=True)
class ModelShape:
    """first, last: parameters that only the first or the last pipeline stage has; the head's matrix is in `last`."""

    layers: tuple[LayerShape, ...]
    first: tuple[Parameter, ...]
    last: tuple[Parameter, ...]
    hidden: int
    vocab: int
    seq_len: int
    heads: int
    kv_heads: int
    tied: bool = False

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """Which of `layer_kinds` each layer is like."""
        found: dict[tuple, int] = {}
        return tuple(found.setdefault(layer.kind, len(found)) for layer in self.layers)

    @cached_property
    def layer_kinds(self) -> tuple[LayerShape, ...]:
        """One layer of each kind: most models have one or two."""
        return tuple(self.layers[self.kind_of.index(kind)] for kind in range(max(self.kind_of) + 1))

    def count_kinds(self, layers: Iterable[int]) -> list[int]:
        """How many of these layers are of each kind."""
        found = [0] * len(self.layer_kinds)
        for layer in layers:
            found[self.kind_of[layer]] += 1
        return found

    @property
    def parameters(self) -> int:
        """Elements of all parameters, a tied head once."""
        blocks = sum(p.elements for layer in self.layers for p in layer.parameters)
        return blocks + sum(p.elements for p in (*self.first, *self.last) if not (self.tied and p.style == "head"))

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, nothing recomputed, attention over what the mask lets see (as the run's own MFU)."""
        return 6.0 * self.hidden * self.vocab + sum(layer.matrix_flops + layer.scores for layer in self.layers)


def read_shape(model: nn.Module, plan: Plan, seq_len: int, scores: float | None = None) -> ModelShape:
    """From a model (whole, on meta) and its plan. scores: attention FLOPs a token of all layers together, where the
    config knows better (windows); None: causal over the whole sequence.
    """
    styles = styles_of(model, plan)
    blocks = match_modules(model, plan.blocks)
    full = [6.0 * seq_len * _attention_width(block, plan) for block in blocks.values()]
    scale = 1.0 if scores is None or not sum(full) else scores / sum(full)
    layers = tuple(
        _read_layer(name, block, plan, styles, flops * scale)
        for (name, block), flops in zip(blocks.items(), full, strict=True)
    )
    ends = {}
    for which, names in (("first", plan.first), ("last", plan.last)):
        ends[which] = tuple(
            Parameter(f"{name}.{key}", tuple(value.shape), styles.get(_owner(name, key), "sequence"))
            for name in names
            if isinstance(module := getattr(model, name, None), nn.Module)
            for key, value in module.named_parameters()
        )
    vocab = next((p.shape[0] for p in ends["last"] if p.style == "head"), 0)
    return ModelShape(
        layers,
        ends["first"],
        ends["last"],
        plan.hidden,
        vocab,
        seq_len,
        plan.heads,
        plan.kv_heads,
        bool(plan.tied),
    )


def _read_layer(name: str, block: nn.Module, plan: Plan, styles: dict[str, Style], scores: float) -> LayerShape:
    parameters, matrices, row_inputs, norms = [], [], [], 0
    owners = {core.rpartition(".")[0] for core in _cores(block, plan)}
    for inner, module in block.named_modules():
        style = styles.get(f"{name}.{inner}" if inner else name, "sequence")
        for key, value in module.named_parameters(recurse=False):
            parameters.append(Parameter(f"{name}.{inner}.{key}", tuple(value.shape), style))
        if isinstance(module, nn.Linear):
            owner = inner.rpartition(".")[0]
            group = inner if style == "row" else owner
            matrices.append(Matrix(module.in_features, module.out_features, style, group))
            if style == "row" and owner in owners:
                row_inputs.append(module.in_features)
        elif style == "sequence" and any(True for _ in module.parameters(recurse=False)):
            norms += 1
    head_dim = row_inputs[0] // plan.heads if row_inputs else 0
    return LayerShape(
        tuple(parameters), tuple(matrices), norms, plan.heads, plan.kv_heads, head_dim, head_dim, scores
    )


def _attention_width(block: nn.Module, plan: Plan) -> int:
    """Heads x width of a head, over all attention cores of a block: what the row-cut projection beside each takes in."""
    width, below = 0, plan.blocks.count(".") + 1
    owners = {core.rpartition(".")[0] for core in _cores(block, plan)}
    for pattern, style in plan.tensor.items():
        inside = ".".join(pattern.split(".")[below:])
        if style == "row" and inside.rpartition(".")[0] in owners:
            width += sum(m.in_features for m in match_modules(block, inside).values() if isinstance(m, nn.Linear))
    return width


def _cores(block: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    return match_modules(block, plan.attention.removeprefix(f"{plan.blocks}.")) if plan.attention else {}


def _owner(name: str, key: str) -> str:
    inner = key.rpartition(".")[0]
    return f"{name}.{inner}" if inner else name

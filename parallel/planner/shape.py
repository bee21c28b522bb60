"""A model as the planner sees it: matrices, attention and parameters of each layer, read from the model itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import nn

from parallel.pipeline_cut import attention_flops
from parallel.plan import Plan, Style, match_modules, styles_of


@dataclass(frozen=True)
class Parameter:
    """style: of its module in the plan. experts: the first dim counts experts, which expert parallelism cuts. Names are
    those of the model."""

    name: str
    shape: tuple[int, ...]
    style: Style = "sequence"
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
    style: Style
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
    def kind(self) -> tuple[object, ...]:
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
        found: dict[tuple[object, ...], int] = {}
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


def read_shape(model: nn.Module, plan: Plan, seq_len: int, scores: float | None = None, top_k: int = 0) -> ModelShape:
    """From a model (whole, on meta) and its plan.

    scores: attention FLOPs a token of all layers together, where the config knows better (windows); None: causal over
    the whole sequence. top_k: experts a token goes to.
    """
    styles = styles_of(model, plan)
    blocks = match_modules(model, plan.blocks)
    full = [attention_flops(block, plan, seq_len) for block in blocks.values()]
    scale = 1.0 if scores is None or not sum(full) else scores / sum(full)
    layers = tuple(
        _read_layer(name, block, plan, styles, flops * scale, top_k)
        for (name, block), flops in zip(blocks.items(), full, strict=True)
    )
    first, last = (tuple(_read_ends(model, names, styles)) for names in (plan.first, plan.last))
    vocab = next((p.shape[0] for p in last if p.style == "head"), 0)
    # A tied head is the embedding under another name, which torch lists once.
    tied = bool(plan.tied)
    return ModelShape(layers, first, last, plan.hidden, vocab, seq_len, plan.heads, plan.kv_heads, tied)


def _read_ends(model: nn.Module, names: tuple[str, ...], styles: dict[str, Style]) -> Iterator[Parameter]:
    for name in names:
        module = getattr(model, name, None)
        for key, value in module.named_parameters() if isinstance(module, nn.Module) else ():
            inner = key.rpartition(".")[0]
            yield Parameter(f"{name}.{key}", tuple(value.shape), styles[f"{name}.{inner}" if inner else name])


def _read_layer(
    name: str, block: nn.Module, plan: Plan, styles: dict[str, Style], scores: float, top_k: int
) -> LayerShape:
    parameters: list[Parameter] = []
    matrices: list[Matrix] = []
    norms = experts = head_dim = 0
    owners = {core.rpartition(".")[0] for core in _cores(block, plan)}
    for inner, module in block.named_modules():
        style = styles.get(f"{name}.{inner}" if inner else name, "sequence")
        own = [(key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False)]
        parameters += (Parameter(f"{name}.{inner}.{key}", dims, style, style == "experts") for key, dims in own)
        owner = inner.rpartition(".")[0]
        if isinstance(module, nn.Linear):
            matrices.append(Matrix(module.in_features, module.out_features, style, inner if style == "row" else owner))
            if style == "row" and owner in owners:
                head_dim = module.in_features // plan.heads
        elif style == "experts":
            experts = plan.experts
            matrices += _read_experts([dims for _, dims in own if len(dims) == 3], inner, top_k)
        elif style == "sequence" and own:
            norms += 1
    heads, kv_heads = (plan.heads, plan.kv_heads) if head_dim else (0, 0)
    return LayerShape(
        tuple(parameters),
        tuple(matrices),
        norms,
        heads,
        kv_heads,
        head_dim,
        head_dim,
        scores,
        experts,
        top_k if experts else 0,
    )


def _read_experts(stacked: list[tuple[int, ...]], name: str, top_k: int) -> Iterator[Matrix]:
    """Of weights [experts, out, in]: the last one gives the width back, the others share an input."""
    for index, (copies, outputs, inputs) in enumerate(stacked):
        last = index == len(stacked) - 1
        group = f"{name}.{index}" if last else name
        yield Matrix(inputs, outputs, "row" if last else "column", group, top_k, copies)


def _cores(block: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    return match_modules(block, plan.attention.removeprefix(f"{plan.blocks}.")) if plan.attention else {}

"""What a family states of itself for Megatron-Core: what it builds, and which of its tensors are which of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

# How one of Megatron's tensors holds ours, each of which is cut over tensor-parallel processes in the same dim.
Layout = Literal[
    "same",  # it is ours
    "rows",  # ours one after the other along dim 0, within each process's part
    "groups",  # query, key, value: for each key/value head its query heads, itself, its value head
]


@dataclass(frozen=True)
class Row:
    """ours: names within a block of ours (or of the model). stacked: ours are stacks, of which each of Megatron's
    experts has one matrix.
    """

    ours: tuple[str, ...]
    layout: Layout = "same"
    stacked: bool = False


@dataclass(frozen=True)
class MegatronFacts:
    """One model for Megatron-Core.

    cfg: the family's config, which the loss reads. arguments: of TransformerConfig, what layout and precision decide
    left out. sparse: which layers have experts. norm: width -> normalisation. core: number of a layer -> module
    `forward(q, k, v [B, S, H, D], context) -> [B, S, H, D]`, with an attention core `core` in it. context: (mask,
    positions) -> what all the cores of a micro-batch are called with, made once. router: hidden width -> module
    `forward(x [B, S, E])` -> (probabilities [B, S, experts], 0 where not chosen; chosen, bool of the same shape), with
    parameters named `weight` and a module `routing`.
    ends, block: Megatron's names, of the model and within a layer -> ours; a name is that of a module or of a tensor.
    layers: our name of the layers. routing: within a layer, ours of what decides. kv_heads, embedding_scale: as ours.
    latent_norm: as norm, on the latents of multi-head latent attention, whose sizes the arguments then have; its core
    rotates the last dims of a head, which keys have the same in all of them. None: attention without latents.
    """

    cfg: Any
    arguments: Mapping[str, Any]
    vocab_size: int
    max_seq_len: int
    tied: bool
    learned_positions: bool
    sparse: tuple[bool, ...]
    norm: Callable[[int], nn.Module]
    core: Callable[[int], nn.Module]
    context: Callable[[Any, Tensor], Any]
    ends: Mapping[str, Row]
    block: Mapping[str, Row]
    router: Callable[[int], nn.Module] | None = None
    routing: str = ""
    layers: str = "layers"
    kv_heads: int = 1
    embedding_scale: float = 1.0
    qk_norm: bool = False
    latent_norm: Callable[[int], nn.Module] | None = None

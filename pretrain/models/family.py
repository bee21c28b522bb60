"""What a model family states about itself. Mechanisms elsewhere apply these facts and name no family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn


class ModelConfig(BaseModel):
    """What every family's config has in common: the recipe's `[model]` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int
    max_seq_len: int

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where sequences of this many tokens cannot be trained on."""
        if seq_len > self.max_seq_len:
            raise ValueError(
                f"data.seq_len = {seq_len} is longer than model.max_seq_len = {self.max_seq_len}; "
                "lower the first or raise the second"
            )

    def check_patches(self, patches: int, tp: int) -> None:
        """Raises ValueError where samples with this many image patches cannot be trained on, or not be cut into `tp`
        parts.
        """
        if patches:
            raise ValueError(
                f'data.patches = {patches}, but model.family = "{getattr(self, "family", "")}" sees no pictures; '
                "set it to 0, or choose a family that does"
            )

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward for one token, attention aside."""
        raise NotImplementedError

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of attention scores and values, forward and backward, for one token of a full sequence."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeedForward:
    """Names of a sparse layer's tensors. dense: gate, up [F, H], down [H, F] of the layer without experts; experts:
    gate, up [E, f, H], down [E, H, f]; router [E, H]; bias [E], where the model has one.
    """

    dense: tuple[str, str, str]
    experts: tuple[str, str, str]
    router: str
    bias: str


@dataclass(frozen=True)
class Family:
    """One architecture family.

    config: pydantic model of the recipe's `[model]` section.
    build: config -> module (on whatever device is current; the engine calls it under `meta`). Its `forward` returns
        hidden states, `head` is a submodule, `layers` a ModuleDict under global indices, and
        `init_parameter(name, tensor, generator)` fills one full CPU tensor with its initial value.
    plan: config -> sharding plan.
    hf: brand name (Hugging Face `model_type`) -> conversion table.
    feed_forward: config -> names of its sparse layers, which surgery makes and cuts; None: the family has none.
    megatron: config -> what Megatron-Core builds of it (ValueError for what it cannot); None: nothing.
    """

    config: type[Any]
    build: Callable[[Any], nn.Module]
    plan: Callable[[Any], Any]
    hf: dict[str, Any]
    feed_forward: Callable[[Any], tuple[FeedForward, ...]] | None = None
    megatron: Callable[[Any], Any] | None = None

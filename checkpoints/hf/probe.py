"""What a native model and transformers' are run on, side by side."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """tokens [B, S] int64, None for models of pictures alone. native, hf: what else each model gets, by the name of the
    argument.
    """

    tokens: Tensor | None
    native: dict[str, Any] = field(default_factory=dict)
    hf: dict[str, Tensor] = field(default_factory=dict)


def text_probe(vocab_size: int, length: int) -> Probe:
    """One row of random tokens, the same at each call."""
    return Probe(torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)))

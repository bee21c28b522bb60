"""What generation keeps of the tokens seen so far."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, by layer; [B, T, K, D] each (T tokens, K key/value heads, D head dim).

    Made by whoever generates, filled by the model's attention layers: one cache a sequence, all layers in step.
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return next(iter(self.entries.values()))[0].shape[1] if self.entries else 0

    def append(self, layer: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's k, v [B, S, K, D] of S new tokens; returns those of all tokens, the new ones last."""
        if layer in self.entries:
            past_k, past_v = self.entries[layer]
            k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
        self.entries[layer] = (k, v)
        return k, v

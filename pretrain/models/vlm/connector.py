"""From the features of patches to tokens of the decoder.

Shape letters: B batch, P patches of a row, W width of their features, E width of the decoder, m merge, Q queries.
"""

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import AttentionCore, AttentionMask
from pretrain.models.layers.mlp import ACTIVATIONS
from pretrain.models.vlm.config import ConnectorConfig, VLMConfig


class Linear(nn.Module):
    """[B, P, W] -> [B, P / m**2, E]: m x m patches, which stand side by side in the row, become one token."""

    def __init__(self, cfg: ConnectorConfig, width: int, hidden: int):
        super().__init__()
        self.merged = cfg.merge**2
        self.project = nn.Linear(width * self.merged, hidden, bias=cfg.bias)

    def forward(self, x: Tensor, images: Tensor, mask: AttentionMask) -> Tensor:
        return self.project(merge(x, self.merged))


class TwoLinear(nn.Module):
    """As `Linear`, with a nonlinearity between two matrices (LLaVA 1.5, arXiv:2310.03744)."""

    def __init__(self, cfg: ConnectorConfig, width: int, hidden: int):
        super().__init__()
        self.merged = cfg.merge**2
        self.activation = ACTIVATIONS[cfg.activation]
        self.up = nn.Linear(width * self.merged, cfg.ffn or hidden, bias=cfg.bias)
        self.down = nn.Linear(cfg.ffn or hidden, hidden, bias=cfg.bias)

    def forward(self, x: Tensor, images: Tensor, mask: AttentionMask) -> Tensor:
        return self.down(self.activation(self.up(merge(x, self.merged))))


class Resampler(nn.Module):
    """[B, P, W] -> [B, P, E]: at the first Q places of an image, what Q learned queries find in its patches (after
    Flamingo's, arXiv:2204.14198). The others' results are not used; an image must have Q patches.
    """

    def __init__(self, cfg: ConnectorConfig, width: int, hidden: int):
        super().__init__()
        self.head_dim = hidden // cfg.heads
        self.queries = nn.Embedding(cfg.queries, hidden)
        self.project = nn.Linear(width, hidden, bias=cfg.bias)
        self.q = nn.Linear(hidden, hidden, bias=cfg.bias)
        self.k = nn.Linear(hidden, hidden, bias=cfg.bias)
        self.v = nn.Linear(hidden, hidden, bias=cfg.bias)
        self.out = nn.Linear(hidden, hidden, bias=cfg.bias)
        self.core = AttentionCore()

    def forward(self, x: Tensor, images: Tensor, mask: AttentionMask) -> Tensor:
        places = torch.arange(images.shape[1], device=images.device).expand_as(images)
        first = torch.ones_like(images, dtype=torch.bool)
        first[:, 1:] = images[:, 1:] != images[:, :-1]
        offset = places - torch.where(first, places, 0).cummax(1).values
        asked = self.queries(offset.clamp(max=self.queries.num_embeddings - 1))
        features = self.project(x)
        heads = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(asked), self.k(features), self.v(features)))
        return self.out(self.core(*heads, mask).flatten(-2))


CONNECTORS = {"linear": Linear, "mlp": TwoLinear, "resampler": Resampler}


def make_connector(cfg: VLMConfig) -> nn.Module:
    return CONNECTORS[cfg.connector.kind](cfg.connector, cfg.patch_width, cfg.hidden)


def merge(x: Tensor, merged: int) -> Tensor:
    """[B, P, W] -> [B, P / merged, merged * W]."""
    return x if merged == 1 else x.unflatten(1, (-1, merged)).flatten(2)

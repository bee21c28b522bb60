"""Normalisation over the last dim, computed in fp32 whatever the input's dtype."""

from typing import Literal

import torch
from torch import Tensor, nn

NormKind = Literal["rms", "rms_unit", "layer"]


class RMSNorm(nn.Module):
    """x / rms(x) * w over the last dim (Zhang & Sennrich 2019).

    `unit_offset` multiplies by (1 + w) instead, so that w starts at 0 (Gemma).
    """

    def __init__(self, dim: int, eps: float, unit_offset: bool = False):
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float() if x.dtype != torch.float64 else x
        scale = self.weight.to(x_fp32.dtype)
        if self.unit_offset:
            scale = scale + 1
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return (normed * scale).to(x.dtype)


def make_norm(kind: NormKind, dim: int, eps: float) -> nn.Module:
    """`rms`: w * x/rms; `rms_unit`: (1 + w) * x/rms; `layer`: LayerNorm with bias."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps)
    return RMSNorm(dim, eps, unit_offset=kind == "rms_unit")

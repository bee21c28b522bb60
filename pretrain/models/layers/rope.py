"""Rotary position embedding (Su et al. 2021) and its long-context scalings.

Frequencies are computed on the device at each forward: a few thousand flops, and no buffer that would have to be
materialised, sharded or saved.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles. `theta`: base; other fields matter to the `scaling` that names them."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic when a recipe holds a Rope

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0  # all scalings: context is stretched by this
    original_max_seq_len: int = 8192  # llama3, yarn: context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is fully interpolated
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from the next two
    mscale: float = 0.0  # yarn: m(mscale) / m(mscale_all_dim) scales cos and sin, with m(x) = 0.1 x ln(factor) + 1
    mscale_all_dim: float = 0.0  # yarn: m(mscale_all_dim)**2 scales scores. 0 for one of the two: m(1) scales cos, sin

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "original_max_seq_len"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rope.{name} = {getattr(self, name)}: must be above 0 and finite")
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope.low_freq_factor = {self.low_freq_factor} must be below rope.high_freq_factor = "
                f"{self.high_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._stretch(self.mscale) / self._stretch(self.mscale_all_dim)
        return self._stretch(1.0)

    @property
    def score_factor(self) -> float:
        """Factor on attention scores (DeepSeek-V2's and V3's)."""
        return self._stretch(self.mscale_all_dim) ** 2 if self.scaling == "yarn" else 1.0

    def _stretch(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle per position of each rotated pair, [head_dim / 2] fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inv_freq = 1.0 / (rope.theta**exponent)
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, inv_freq)
    if rope.scaling == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    return inv_freq


def _llama3(rope: Rope, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended (Llama 3.1)."""
    rotations = rope.original_max_seq_len * inv_freq / (2 * math.pi)
    keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope.factor)


def _yarn(rope: Rope, inv_freq: Tensor, head_dim: int) -> Tensor:
    """NTK-by-parts interpolation (Peng et al. 2023): a linear ramp over the index of the pair."""

    def pair_index(rotations: float) -> float:
        wavelengths = rope.original_max_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_index(rope.beta_fast)), 0)
    high = min(math.ceil(pair_index(rope.beta_slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=inv_freq.device)
    interpolate = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq * (1 - interpolate) + inv_freq / rope.factor * interpolate


def cos_sin(rope: Rope, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """positions [B, S] int -> cos, sin [B, S, 1, head_dim / 2] fp32."""
    angles = positions[..., None].float() * inverse_frequencies(rope, head_dim, positions.device)
    return (angles.cos() * rope.amplitude)[..., None, :], (angles.sin() * rope.amplitude)[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Rotate x [B, S, H, D]: pair i is (x[i], x[i + D/2]), the layout of Hugging Face's Llama; in fp32 or wider.

    neighbours: pair i is (x[2i], x[2i + 1]), and comes out where the other layout has it. Where cos and sin are for
    fewer dims, the first ones are rotated and the others stay.
    """
    dims = 2 * cos.shape[-1]
    x_wide = x[..., :dims].to(torch.promote_types(x.dtype, cos.dtype))
    first, second = (x_wide[..., 0::2], x_wide[..., 1::2]) if neighbours else x_wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if dims == x.shape[-1] else torch.cat((rotated, x[..., dims:]), dim=-1)

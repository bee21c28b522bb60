"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made from a narrow latent.

    q_down, q_norm, q_up     hidden -> q_rank -> a query [nope | rope] for each head (without compression: q alone)
    kv_down                  hidden -> [kv_rank | rope]: the latent, and one rotated key part that all heads share
    kv_norm, kv_up           kv_rank -> a key part without position and a value [nope | v] for each head

Shape letters: B batch, S sequence, H heads, E hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import AttentionCore, AttentionMask
from pretrain.models.layers.cache import KVCache
from pretrain.models.layers.linear import fused_linear
from pretrain.models.layers.norm import NormKind, make_norm
from pretrain.models.layers.rope import rotate

LATENT_EPS = 1e-6  # of the norms on latents, whatever the other norms have: so do DeepSeek's own code and transformers


@dataclass(frozen=True)
class MLA:
    """The recipe's `[model.mla]`: the widths of latents and of one head's parts, with DeepSeek-V3's as defaults."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic

    q_rank: int = 1536  # width of the queries' latent; 0: queries are not compressed
    kv_rank: int = 512  # width of the latent of keys and values
    nope_dim: int = 128  # of a head's query and key, the part without position
    rope_dim: int = 64  # the part that is rotated
    v_dim: int = 128  # of a head's value

    def __post_init__(self) -> None:
        for key, least in (("q_rank", 0), ("kv_rank", 1), ("nope_dim", 1), ("rope_dim", 2), ("v_dim", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"model.mla.{key} = {getattr(self, key)}: must be at least {least}")
        if self.rope_dim % 2:
            raise ValueError(f"model.mla.rope_dim = {self.rope_dim} is odd; rotary positions rotate pairs")

    @property
    def qk_dim(self) -> int:
        """Width of one head's query and key."""
        return self.nope_dim + self.rope_dim

    def num_parameters(self, hidden: int, heads: int, norm: int) -> int:
        """Of one layer, a bias on its output aside. norm: parameters of a norm per dim."""
        q = hidden * heads * self.qk_dim
        if self.q_rank:
            q = self.q_rank * (hidden + heads * self.qk_dim + norm)
        kv = hidden * (self.kv_rank + self.rope_dim) + self.kv_rank * (heads * (self.nope_dim + self.v_dim) + norm)
        return q + kv + heads * self.v_dim * hidden


class LatentAttention(nn.Module):
    """x [B, S, E] -> [B, S, E]. Pairs of rotated dims are neighbours, as in the weights that DeepSeek publishes."""

    def __init__(
        self, cfg: MLA, hidden: int, heads: int, norm: NormKind, out_bias: bool, core: AttentionCore, layer: str
    ):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        if cfg.q_rank:
            self.q_down = nn.Linear(hidden, cfg.q_rank, bias=False)
            self.q_norm = make_norm(norm, cfg.q_rank, LATENT_EPS)
            self.q_up = nn.Linear(cfg.q_rank, heads * cfg.qk_dim, bias=False)
        else:
            self.q = nn.Linear(hidden, heads * cfg.qk_dim, bias=False)
        self.kv_down = nn.Linear(hidden, cfg.kv_rank + cfg.rope_dim, bias=False)
        self.kv_norm = make_norm(norm, cfg.kv_rank, LATENT_EPS)
        self.kv_up = nn.Linear(cfg.kv_rank, heads * (cfg.nope_dim + cfg.v_dim), bias=False)
        self.shared = nn.Identity()  # what all heads share passes here: a place to gather it from other processes
        self.out = nn.Linear(heads * cfg.v_dim, hidden, bias=out_bias)
        self.core = core

    def forward(
        self, x: Tensor, mask: AttentionMask, rotation: tuple[Tensor, Tensor] | None, cache: KVCache | None = None
    ) -> Tensor:
        cfg = self.cfg
        if cfg.q_rank:
            q, kv = fused_linear(x, self.q_down, self.kv_down)
            q = self.q_up(self.q_norm(q))
        else:
            q, kv = self.q(x), self.kv_down(x)
        latent, k_rope = kv.split([cfg.kv_rank, cfg.rope_dim], dim=-1)
        q = q.unflatten(-1, (-1, cfg.qk_dim))
        k, v = (
            self.kv_up(self.kv_norm(latent))
            .unflatten(-1, (-1, cfg.nope_dim + cfg.v_dim))
            .split([cfg.nope_dim, cfg.v_dim], dim=-1)
        )
        k_rope = self.shared(k_rope)[:, :, None]
        if rotation is not None:
            q_nope, q_rope = q.split([cfg.nope_dim, cfg.rope_dim], dim=-1)
            q = torch.cat((q_nope, rotate(q_rope, *rotation, neighbours=True)), dim=-1)
            k_rope = rotate(k_rope, *rotation, neighbours=True)
        k = torch.cat((k, k_rope.expand(-1, -1, k.shape[2], -1)), dim=-1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(self.core(q, k, v, mask).flatten(-2))

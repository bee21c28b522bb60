"""A causal decoder: embedding, blocks of attention and feed-forward, final norm, head.

Shape letters: B batch, S sequence, E hidden, H query heads, K key/value heads, D head dim, V vocabulary.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Generator, Tensor, nn

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.layers.attention import AttentionCore, AttentionMask
from pretrain.models.layers.cache import KVCache
from pretrain.models.layers.linear import fused_linear
from pretrain.models.layers.mla import LatentAttention
from pretrain.models.layers.mlp import MLP, GatedMLP
from pretrain.models.layers.moe import MixtureOfExperts
from pretrain.models.layers.norm import make_norm
from pretrain.models.layers.rope import cos_sin, rotate

Rotation = tuple[Tensor, Tensor]  # cos, sin: [B, S, 1, D / 2]
RESIDUAL = (".attention.out", ".mlp.down", ".moe.experts.down", ".moe.shared.down")  # they write to the stream


class Attention(nn.Module):
    def __init__(self, cfg: DecoderConfig, layer: str):
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.dim_per_head
        q_width, kv_width = cfg.heads * self.head_dim, cfg.num_kv_heads * self.head_dim
        self.q = nn.Linear(cfg.hidden, q_width, bias=cfg.qkv_bias)
        self.k = nn.Linear(cfg.hidden, kv_width, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.hidden, kv_width, bias=cfg.qkv_bias)
        self.out = nn.Linear(q_width, cfg.hidden, bias=cfg.out_bias)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm != "none":
            q_dim, k_dim = (q_width, kv_width) if cfg.qk_norm == "full" else (self.head_dim, self.head_dim)
            self.q_norm = make_norm(cfg.norm, q_dim, cfg.norm_eps)
            self.k_norm = make_norm(cfg.norm, k_dim, cfg.norm_eps)
        self.core = make_core(cfg)

    def forward(
        self, x: Tensor, mask: AttentionMask, rotation: Rotation | None, cache: KVCache | None = None
    ) -> Tensor:
        q, k, v = fused_linear(x, self.q, self.k, self.v)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(self.core(q, k, v, mask).flatten(-2))


def make_core(cfg: DecoderConfig) -> AttentionCore:
    scale = cfg.attention_scale or None
    if cfg.mla is not None:
        scale = (scale or cfg.dim_per_head**-0.5) * cfg.rope.score_factor
    return AttentionCore(scale, cfg.attention_softcap or None)


def make_attention(cfg: DecoderConfig, layer: str) -> nn.Module:
    if cfg.mla is None:
        return Attention(cfg, layer)
    return LatentAttention(cfg.mla, cfg.hidden, cfg.heads, cfg.norm, cfg.out_bias, make_core(cfg), layer)


class Block(nn.Module):
    """x + attention, then x + feed-forward (`mlp`; if sparse, `moe`); norms before each, on its output, or both."""

    def __init__(self, cfg: DecoderConfig, index: int):
        super().__init__()
        self.kind = cfg.layer_kind(index)
        self.attention = make_attention(cfg, str(index))
        if cfg.moe is not None and cfg.sparse(index):
            self.moe = MixtureOfExperts(cfg.moe, cfg.hidden, cfg.activation)
        else:
            mlp = GatedMLP if cfg.gated else MLP
            self.mlp = mlp(cfg.hidden, cfg.ffn, cfg.activation, cfg.mlp_bias)
        self.sparse = cfg.sparse(index)

        def norm(position: str) -> nn.Module:
            if cfg.norm_position not in (position, "both"):
                return nn.Identity()
            return make_norm(cfg.norm, cfg.hidden, cfg.norm_eps)

        self.attention_norm = norm("pre")
        self.attention_post_norm = norm("post")
        self.mlp_norm = norm("pre")
        self.mlp_post_norm = norm("post")

    def forward(
        self, x: Tensor, mask: AttentionMask, rotation: Rotation | None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), mask, rotation, cache))
        feed_forward = self.moe if self.sparse else self.mlp
        return x + self.mlp_post_norm(feed_forward(self.mlp_norm(x)))


class Decoder(nn.Module):
    """tokens [B, S] -> hidden states [B, S, E] after the final norm; `head` maps them to logits [B, S, V].

    A pipeline stage has some of the layers only, and None for those of `embed`, `pos_embed`, `norm` and `head` that
    another has: without `embed` it takes hidden states, without `norm` it gives those of its last layer.
    """

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed: nn.Module | None = nn.Embedding(cfg.vocab_size, cfg.hidden)
        learned = cfg.positions == "learned"
        self.pos_embed: nn.Module | None = nn.Embedding(cfg.max_seq_len, cfg.hidden) if learned else None
        self.layers = nn.ModuleDict({str(i): Block(cfg, i) for i in range(cfg.layers)})
        self.norm: nn.Module | None = make_norm(cfg.norm, cfg.hidden, cfg.norm_eps)
        self.head: nn.Module | None = nn.Linear(cfg.hidden, cfg.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding with the head; call again after parameters were replaced (materialising from meta)."""
        if self.cfg.tied and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x: tokens, or hidden states where there is no `embed`. mask: causal when None; positions [B, S] or [1, S]:
        counted from the cache's end when None.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        if self.embed is not None:
            x = self.embed_tokens(x, positions)
        return self.run(x, AttentionMask() if mask is None else mask, positions, cache)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [B, S] -> [B, S, E]: what the blocks get."""
        assert self.embed is not None
        x = self.embed(tokens)
        if self.cfg.embedding_scale != 1.0:
            x = x * self.cfg.embedding_scale
        return x if self.pos_embed is None else x + self.pos_embed(positions)

    def run(self, x: Tensor, mask: AttentionMask, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Blocks and final norm, as far as this stage has them."""
        masks, rotations = by_kind(self.cfg, mask, positions)
        for block in cast(Iterable[Block], self.layers.values()):
            x = block(x, masks[block.kind], rotations[block.kind], cache)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] -> logits [..., V], soft cap included."""
        assert self.head is not None
        logits = self.head(hidden)
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def init_parameter(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Fill the parameter called `name` (a full CPU tensor) with its initial value.

        Normal with `init_std`; projections back into the residual stream are divided by sqrt(2 * layers), so that its
        variance does not grow with depth (GPT-2).
        """
        owner, kind = name.rsplit(".", 1)
        if kind == "bias":  # a router's too
            tensor.zero_()
        elif owner.rsplit(".", 1)[-1].endswith("norm"):
            tensor.fill_(0.0 if self.cfg.norm == "rms_unit" else 1.0)
        else:
            residual = name.removesuffix(".weight").endswith(RESIDUAL)
            std = self.cfg.init_std / math.sqrt(2 * self.cfg.layers) if residual else self.cfg.init_std
            tensor.normal_(0.0, std, generator=generator)


def by_kind(
    cfg: DecoderConfig, mask: AttentionMask, positions: Tensor
) -> tuple[dict[str, AttentionMask], dict[str, Rotation | None]]:
    """The mask and the rotation of each kind of layer, made once and shared by its layers."""
    masks = {"full": mask, "nope": mask}
    rotations: dict[str, Rotation | None] = {"full": None, "nope": None, "sliding": None}
    if cfg.positions == "rope":
        rotations["full"] = cos_sin(cfg.rope, positions, cfg.rotary_dim)
        rotations["sliding"] = rotations["full"]
    if cfg.window:
        masks["sliding"] = mask.with_window(cfg.window)
        if cfg.rope_local is not None:
            rotations["sliding"] = cos_sin(cfg.rope_local, positions, cfg.rotary_dim)
    return masks, rotations

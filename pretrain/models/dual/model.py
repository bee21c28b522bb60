"""Two towers that meet: CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai et al. 2023, arXiv:2303.15343).

    patches -> vision (VisionTower) -> one vector an image   -> image_head -> / its length -> features
    tokens  -> the decoder's blocks -> one vector a caption  -> text_head  -> / its length -> features

Shape letters: B batch (one image and one caption each), S tokens, P patches, E width of the text tower, H of the image
tower, d features.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pretrain.models.decoder.model import Decoder
from pretrain.models.dual.config import DualConfig
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.layers.mlp import MLP
from pretrain.models.layers.norm import make_norm
from pretrain.models.vlm.model import Pictures
from pretrain.models.vlm.tower import VisionConfig, VisionTower, init_tower_parameter


class MapPool(nn.Module):
    """[B, P, H] -> [B, 1, H]: what a learned query finds in an image's patches, and a feed-forward layer (SigLIP)."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.head_dim = cfg.hidden // cfg.heads
        self.probe_embed = nn.Embedding(1, cfg.hidden)
        self.q = nn.Linear(cfg.hidden, cfg.hidden)
        self.k = nn.Linear(cfg.hidden, cfg.hidden)
        self.v = nn.Linear(cfg.hidden, cfg.hidden)
        self.out = nn.Linear(cfg.hidden, cfg.hidden)
        self.norm = make_norm(cfg.norm, cfg.hidden, cfg.norm_eps)
        self.mlp = MLP(cfg.hidden, cfg.ffn, cfg.activation, bias=True)

    def forward(self, x: Tensor, held: Tensor) -> Tensor:
        """held [B, P]: whether a patch is of the image."""
        q = self.q(self.probe_embed(torch.zeros_like(held[:, :1], dtype=torch.int32)))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=held[:, None, None])
        x = self.out(found.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm(x))


class Number(nn.Module):
    """One learned number, [1]: a module, so that a plan can name it; what it is given says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


class Dual(Decoder):
    """pictures, captions -> features [B, 2, d] of images and of captions, of length 1; `temperature`: how they compare.

    The text tower's modules are the decoder's, without its head.
    """

    cfg: DualConfig

    def __init__(self, cfg: DualConfig):
        super().__init__(cfg)
        self.head = None
        self.vision = VisionTower(cfg.vision, cfg.patches)
        self.pool = MapPool(cfg.vision) if cfg.image_pool == "map" else None
        self.image_head = nn.Linear(cfg.vision.hidden, cfg.features, bias=False) if cfg.image_head else None
        self.text_head = nn.Linear(cfg.hidden, cfg.features, bias=cfg.text_bias)
        self.log_scale = Number()
        self.offset = Number() if cfg.logit_bias is not None else None
        self.image_rows = nn.Identity()  # where tensor parallelism gathers the parts of rows
        self.text_rows = nn.Identity()

    def forward(self, pictures: Pictures, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """tokens [B, S]; lengths [B] of captions in tokens, padding left out."""
        return torch.stack((self.encode_images(pictures), self.encode_texts(tokens, lengths)), dim=1)

    def encode_images(self, pictures: Pictures) -> Tensor:
        """Features [B, d] of the one image in each row, of length 1, fp32 (fp64 where the model is)."""
        x = self.image_rows(self.vision(pictures.patches, pictures.grid, pictures.mask))
        held = pictures.images >= 0
        if self.pool is not None:
            x = self.pool(x, held | ~held.any(1, keepdim=True))  # a softmax over nothing would be NaN
        elif self.cfg.image_pool == "class":
            x = x[:, :1]
        else:
            x = (x * held[..., None]).sum(1, keepdim=True) / held.sum(1).clamp(min=1)[:, None, None]
        return normalised(x if self.image_head is None else self.image_head(x))

    def encode_texts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Features [B, d] of captions, of length 1, fp32 (fp64 where the model is)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.run(self.embed_tokens(tokens, positions), AttentionMask(causal=self.cfg.causal), positions)
        x = self.text_rows(x)
        last = torch.full_like(lengths, tokens.shape[1] - 1) if self.cfg.text_pool == "last" else lengths - 1
        x = x.gather(1, last.clamp(min=0)[:, None, None].long().expand(-1, 1, x.shape[-1]))
        return normalised(self.text_head(x))

    def temperature(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factor [1] and summand [1] that turn cosines into logits; `like`: any tensor on the model's device."""
        scale = self.log_scale(like).exp()
        return scale, torch.zeros_like(scale) if self.offset is None else self.offset(like)

    def init_parameter(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """The text tower as the decoder, the image tower as a vision-language model's, but that positions, class token
        and query have a variance of 1 / width: both papers' code does so, and places are told apart much earlier.
        """
        if name == "log_scale.weight":
            tensor.fill_(math.log(self.cfg.logit_scale))
        elif name == "offset.weight":
            tensor.fill_(self.cfg.logit_bias or 0.0)
        elif name.startswith(("vision.", "pool.")) and name.endswith("_embed.weight") and "patch" not in name:
            tensor.normal_(0.0, self.cfg.vision.hidden**-0.5, generator=generator)
        elif name.startswith(("vision.", "pool.", "image_head.", "text_head.")):
            init_tower_parameter(name, tensor, generator)
        else:
            super().init_parameter(name, tensor, generator)


def normalised(x: Tensor) -> Tensor:
    """[B, 1, d] -> [B, d] of length 1."""
    return F.normalize(x[:, 0].to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

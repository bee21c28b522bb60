"""A decoder that sees: features of patches stand in place of the embeddings of image tokens.

    patches -> vision (VisionTower) -> connector -> features of a row's patches
    tokens  -> embed; where a token has a slot, the feature at that place -> the decoder's blocks

Every step runs the tower on rows of the same shape, with or without images in them: no process ever waits for another.
Shape letters: B batch, S sequence, P patches of a row, D values of a patch, E hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from pretrain.models.decoder.model import Decoder
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.layers.cache import KVCache
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.connector import make_connector
from pretrain.models.vlm.tower import VisionTower, init_tower_parameter, normalise


@dataclass(frozen=True, eq=False)
class Pictures:
    """patches uint8 [B, P, D] as (channel, y, x); images [B, P]: which image of its row a patch is of, -1 for none;
    grid [B, P, 2]: its row and column in the image, (-1, -1) for a class token; mask: of the tower.
    """

    patches: Tensor
    images: Tensor
    grid: Tensor
    mask: AttentionMask

    @classmethod
    def packed(cls, patches: Tensor, images: Tensor, grid: Tensor) -> Pictures:
        """Patches see those of their own image."""
        return cls(patches, images, grid, AttentionMask.packed(images, causal=False))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pictures:
        names = ("patches", "images", "grid", "mask")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


class VLM(Decoder):
    """As `Decoder`, with pictures. slots [B, S]: place in its row, [0, P), of the (first) patch that a token stands
    for; -1 for text.
    """

    cfg: VLMConfig

    def __init__(self, cfg: VLMConfig):
        super().__init__(cfg)
        self.vision: nn.Module | None = None if cfg.vision is None else VisionTower(cfg.vision, cfg.patches)
        self.connector: nn.Module | None = make_connector(cfg)
        self.features: nn.Module | None = nn.Identity()  # where tensor parallelism gathers parts of rows of patches
        self.slots: nn.Module | None = nn.Identity()  # where it cuts rows of tokens

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        pictures: Pictures | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Without `pictures` it is the decoder; a pipeline stage without `embed` does not look at them."""
        if pictures is None or self.embed is None:
            return super().forward(x, mask, positions, cache)
        assert slots is not None and self.slots is not None
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        x = self.embed_tokens(x, positions)
        slots = self.slots(slots)
        seen = self.see(pictures).to(x.dtype)
        # An image's tokens lie m * m patches apart where so many became one.
        index = slots.clamp(min=0)[..., None].long() // self.cfg.connector.merge**2
        x = torch.where(slots[..., None] >= 0, seen.gather(1, index.expand(-1, -1, x.shape[-1])), x)
        return self.run(x, AttentionMask() if mask is None else mask, positions, cache)

    def see(self, pictures: Pictures) -> Tensor:
        """What stands for the patches [B, P / m**2, E]."""
        assert self.connector is not None and self.features is not None
        if self.vision is not None:
            x = self.vision(pictures.patches, pictures.grid, pictures.mask)
        else:
            x = normalise(pictures.patches, self.cfg.patches, next(self.connector.parameters()).dtype)
        return self.features(self.connector(x, pictures.images, pictures.mask))

    def init_parameter(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """As the decoder's; matrices of the tower have a variance of 1 / inputs, as their widths differ."""
        if not name.startswith(("vision.", "connector.")):
            super().init_parameter(name, tensor, generator)
        else:
            init_tower_parameter(name, tensor, generator)

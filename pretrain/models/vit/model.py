"""A vision transformer that classifies (Dosovitskiy et al. 2021, arXiv:2010.11929): a tower, pooling, a linear head.

Shape letters: B batch (one picture each), P patches of a row, D values of a patch, H width, C classes.
"""

from typing import cast

from torch import Generator, Tensor, nn

from pretrain.models.layers.attention import AttentionMask
from pretrain.models.vit.config import ViTConfig
from pretrain.models.vlm.tower import VisionTower, init_tower_parameter

STEM = ("patch_embed", "flags", "class_embed", "pos_embed", "first_norm")  # of the first pipeline stage alone


class ViT(VisionTower):
    """patches [B, P, D] -> hidden states [B, P, H] after the final norm; `logits` makes classes [B, C] of them.

    The modules are the tower's, and `head`. A pipeline stage has some of the layers only, and None for those of `STEM`,
    `norm`, `rows` and `head` that another has.
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__(cfg.vision, cfg.patches)
        self.pool = cfg.pool
        self.rows = nn.Identity()  # where tensor parallelism gathers the parts of rows
        self.head = nn.Linear(cfg.vision.hidden, len(cfg.classes))

    def tie_weights(self) -> None:
        """Nothing is tied."""

    def forward(self, x: Tensor, grid: Tensor, mask: AttentionMask) -> Tensor:
        """x: patches, values from 0 to 255; hidden states where there is no `patch_embed`. grid [B, P, 2] and mask as
        the tower's.
        """
        return self.run(x if self.patch_embed is None else self.embed(x, grid), grid, mask)

    def logits(self, hidden: Tensor, held: Tensor | None = None) -> Tensor:
        """hidden [B, P, H], or this process's part of each row -> [B, C].

        held [B, P]: whether a patch is of the picture; None: all are. Raises ValueError where the mean is to be taken
        over rows of which context parallelism has left a part.
        """
        x = self.rows(hidden)
        if self.pool == "class":
            return cast(Tensor, self.head(x[:, 0]))
        if held is None:
            return cast(Tensor, self.head(x.mean(1)))
        if held.shape[1] != x.shape[1]:
            raise ValueError(
                f'parallel.cp = {held.shape[1] // x.shape[1]}: model.pool = "mean" needs whole rows of patches; set it '
                'to 1, or model.pool = "class"'
            )
        return cast(Tensor, self.head((x * held[..., None]).sum(1) / held.sum(1).clamp(min=1)[:, None]))

    def init_parameter(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """As a tower's, but that positions and class token have a variance of 1 / width, as a dual encoder's."""
        if name in ("pos_embed.weight", "class_embed.weight"):
            tensor.normal_(0.0, self.cfg.hidden**-0.5, generator=generator)
        else:
            init_tower_parameter(name, tensor, generator)

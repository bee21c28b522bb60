"""A vision transformer over packed patches: several images of any shape share a row.

Shape letters: B batch, P patches of a row, D values of a patch (channel, y, x), H width of the tower.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.model import Block, Rotation
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.layers.mlp import Activation
from pretrain.models.layers.norm import NormKind, make_norm
from pretrain.models.layers.rope import Rope, cos_sin

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PatchConfig(BaseModel):
    """How pictures become patches: the recipe's `[model.patches]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(16, gt=0, description="Pixels of a patch's side")
    mean: tuple[float, float, float] = Field(CLIP_MEAN, description="Of each channel, of values from 0 to 1")
    std: tuple[float, float, float] = Field(CLIP_STD, description="Of each channel, of values from 0 to 1")

    @model_validator(mode="after")
    def _consistent(self) -> "PatchConfig":
        if min(self.std) <= 0:
            raise ValueError(f"model.patches.std = {self.std}: each must be above 0")
        return self

    @property
    def values(self) -> int:
        """D: numbers in a patch."""
        return 3 * self.size**2


class VisionConfig(BaseModel):
    """A vision tower: the recipe's `[model.vision]`. The defaults are a ViT as SigLIP has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(384, gt=0, description="Width of the tower")
    layers: int = Field(6, gt=0, description="Number of blocks")
    heads: int = Field(6, gt=0, description="Number of heads")
    ffn: int = Field(1536, gt=0, description="Width inside the feed-forward layer")
    activation: Activation = Field("gelu_tanh", description="Nonlinearity of the feed-forward layer")
    norm: NormKind = Field("layer", description="As of the language model")
    norm_eps: float = Field(1e-6, gt=0, description="Added to the variance")
    bias: bool = Field(True, description="Biases in the blocks' projections")
    patch_bias: bool = Field(True, description="A bias on the embedding of patches")
    positions: Literal["learned", "rope"] = Field(
        "learned", description="A learned vector for each place of the grid, or rotary over rows and columns"
    )
    grid: tuple[int, int] = Field((14, 14), description="Rows and columns that learned positions know")
    class_token: bool = Field(False, description="A token of its own stands before each image's patches")
    first_norm: bool = Field(False, description="A norm before the first block (CLIP)")
    output_layer: int = Field(
        -1, lt=0, description="Whose output is taken: -1 of the last block, after the final norm; -2 of the one before"
    )
    final_norm: bool = Field(True, description="Whether the last block's output is normed, where it is taken")

    @model_validator(mode="after")
    def _consistent(self) -> "VisionConfig":
        if self.hidden % self.heads:
            raise ValueError(
                f"model.vision.hidden = {self.hidden} is not divisible by model.vision.heads = {self.heads}; change one"
            )
        if self.positions == "rope" and self.hidden // self.heads % 4:
            raise ValueError(
                f"model.vision: heads of {self.hidden // self.heads} dims; rotary positions over rows and columns "
                "rotate pairs of each half: a multiple of 4 is needed"
            )
        if -self.output_layer > self.layers:
            raise ValueError(
                f"model.vision.output_layer = {self.output_layer}, but there are {self.layers} layers; raise it"
            )
        return self

    @property
    def places(self) -> int:
        """Learned positions, that of the class token included."""
        return self.grid[0] * self.grid[1] + self.class_token

    @property
    def used(self) -> int:
        """Blocks that run; what is past them is kept for conversion alone."""
        return self.layers + 1 + self.output_layer

    @property
    def normed(self) -> bool:
        """Whether the final norm has a part in the output; without, it is kept for conversion alone."""
        return self.output_layer == -1 and self.final_norm

    @property
    def blocks(self) -> DecoderConfig:
        """The same as the config of a decoder's blocks."""
        return DecoderConfig(
            vocab_size=1,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            activation=self.activation,
            gated=False,
            mlp_bias=self.bias,
            qkv_bias=self.bias,
            out_bias=self.bias,
            norm=self.norm,
            norm_eps=self.norm_eps,
            positions="learned",
        )

    def num_parameters(self, patch_values: int) -> int:
        norm = (2 if self.norm == "layer" else 1) * self.hidden
        learned = self.places * self.hidden if self.positions == "learned" else 0
        layers = self.layers * self.blocks.layer_parameters(0)
        ends = self.hidden * (patch_values + self.patch_bias + self.class_token)
        return layers + ends + learned + (1 + self.first_norm) * norm


class VisionTower(nn.Module):
    """patches [B, P, D], values from 0 to 255 -> features [B, P, H], one for each patch (class token included).

    images [B, P]: which image of its row a patch is of, -1 for none; grid [B, P, 2]: its row and column there, (-1, -1)
    for the class token. mask: of patches of one image for each other.
    """

    def __init__(self, cfg: VisionConfig, patches: PatchConfig):
        super().__init__()
        self.cfg, self.patches = cfg, patches
        self.patch_embed = nn.Linear(patches.values, cfg.hidden, bias=cfg.patch_bias)
        self.flags = nn.Identity()  # where tensor parallelism cuts them along the row
        self.class_embed = nn.Linear(1, cfg.hidden, bias=False) if cfg.class_token else None
        self.pos_embed = nn.Embedding(cfg.places, cfg.hidden) if cfg.positions == "learned" else None
        self.first_norm = make_norm(cfg.norm, cfg.hidden, cfg.norm_eps) if cfg.first_norm else None
        self.layers = nn.ModuleDict({str(i): Block(cfg.blocks, i) for i in range(cfg.layers)})
        self.norm = make_norm(cfg.norm, cfg.hidden, cfg.norm_eps)
        for index in range(cfg.used, cfg.layers):
            self.layers[str(index)].requires_grad_(False)
        if not cfg.normed:
            self.norm.requires_grad_(False)

    def forward(self, patches: Tensor, grid: Tensor, mask: AttentionMask) -> Tensor:
        return self.run(self.embed(patches, grid), grid, mask)

    def embed(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Hidden states [B, P, H] that the first block takes."""
        x: Tensor = self.patch_embed(normalise(patches, self.patches, self.patch_embed.weight.dtype))
        if self.class_embed is not None:
            flags = self.flags((grid[..., :1] < 0).to(x.dtype))
            x = torch.where(flags > 0, self.class_embed(flags), x)
        if self.pos_embed is not None:
            x = x + self.pos_embed(self._place(grid))
        return x if self.first_norm is None else self.first_norm(x)

    def run(self, x: Tensor, grid: Tensor, mask: AttentionMask) -> Tensor:
        """Through the blocks, and the last norm where the config and this part of the tower have it."""
        cfg = self.cfg
        rotation = rotation_2d(grid, cfg.hidden // cfg.heads) if cfg.positions == "rope" else None
        for block in list(cast(Iterable[Any], self.layers.values()))[: cfg.used]:
            x = block(x, mask, rotation)
        return self.norm(x) if cfg.normed and self.norm is not None else x

    def _place(self, grid: Tensor) -> Tensor:
        """Which learned position [B, P]: the class token's comes first, if there is one."""
        place = grid[..., 0] * self.cfg.grid[1] + grid[..., 1] + self.cfg.class_token
        return place.clamp(0, self.cfg.places - 1)


def normalise(patches: Tensor, cfg: PatchConfig, dtype: torch.dtype) -> Tensor:
    """Values from 0 to 255 [B, P, D] -> (x / 255 - mean) / std, channel by channel."""
    mean, std = (torch.tensor(v, dtype=dtype, device=patches.device)[:, None] for v in (cfg.mean, cfg.std))
    channels = patches.to(dtype).unflatten(-1, (3, -1)) / 255
    return ((channels - mean) / std).flatten(-2)


def rotation_2d(grid: Tensor, head_dim: int) -> Rotation:
    """grid [B, P, 2] -> cos, sin [B, P, 1, head_dim / 2]: one half of the pairs turns with the row, one with the
    column.
    """
    parts = [cos_sin(Rope(), grid[..., axis].clamp(min=0), head_dim // 2) for axis in (0, 1)]
    cos, sin = (torch.cat(halves, dim=-1) for halves in zip(*parts, strict=True))
    return cos, sin


def init_tower_parameter(name: str, tensor: Tensor, generator: Generator) -> None:
    """Fill a parameter of a tower or connector (a full CPU tensor): norms 1, biases 0, embeddings of std 0.02, matrices
    of variance 1 / inputs.
    """
    owner, kind = name.rsplit(".", 1)
    if kind == "bias":
        tensor.zero_()
    elif owner.endswith("norm"):
        tensor.fill_(1.0)
    elif owner.endswith(("pos_embed", "class_embed", "queries")):
        tensor.normal_(0.0, 0.02, generator=generator)
    else:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)

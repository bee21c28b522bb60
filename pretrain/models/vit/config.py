"""Dimensions and choices of a vision transformer that classifies pictures."""

import math
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.models.vlm.tower import PatchConfig, VisionConfig

HALF = (0.5, 0.5, 0.5)


class ViTConfig(BaseModel):
    """A vision tower and a linear head. A row is one picture: `data.seq_len` counts its patches, as `data.patches`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    moe: ClassVar[None] = None

    family: Literal["vit"] = Field("vit", description="Model family")
    classes: tuple[str, ...] = Field(min_length=1, description="Names of the classes, which captions tell")
    pool: Literal["class", "mean"] = Field(
        "class", description="What stands for a picture: its class token, or the mean of its patches"
    )
    vision: VisionConfig = Field(VisionConfig(class_token=True, activation="gelu"), description="Tower")
    patches: PatchConfig = Field(PatchConfig(mean=HALF, std=HALF), description="How pictures become patches")

    @model_validator(mode="after")
    def _consistent(self) -> "ViTConfig":
        if self.vision.class_token != (self.pool == "class"):
            raise ValueError(
                f'model.pool = "{self.pool}" with model.vision.class_token = {self.vision.class_token}: a class token '
                'is what "class" takes, and nothing else has any; change one'
            )
        if self.vision.output_layer != -1:
            raise ValueError(
                f"model.vision.output_layer = {self.vision.output_layer}: a classifier takes the last; set it to -1"
            )
        return self

    @property
    def vocab_size(self) -> int:
        """Classes, which stand for captions as tokens do for text."""
        return len(self.classes)

    @property
    def layers(self) -> int:
        return self.vision.layers

    @property
    def places(self) -> int:
        """Patches of a picture that fills the grid, the class token's place included."""
        return math.prod(self.vision.grid) + self.vision.class_token

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where rows of this many patches cannot hold a picture that fills the grid."""
        if self.vision.positions == "learned" and seq_len < self.places:
            raise ValueError(
                f"data.seq_len = {seq_len}, but a picture has {self.places} patches (model.vision.grid = "
                f"{list(self.vision.grid)}{', class token' if self.vision.class_token else ''}); raise it"
            )

    def check_patches(self, patches: int, tp: int) -> None:
        """Raises ValueError where data has no patches, or they cannot be cut into `tp` parts."""
        if patches < 1:
            raise ValueError(
                f"data.patches = {patches}: a classifier needs the patches of one picture a row; set it to data.seq_len"
            )
        if patches % tp:
            raise ValueError(
                f"parallel.tp = {tp} does not divide the {patches} patches of a row; raise data.patches and "
                f"data.seq_len to {-(-patches // tp) * tp}: what no picture fills is padding"
            )

    def num_parameters(self, active: bool = False) -> int:
        return self.vision.num_parameters(self.patches.values) + (self.vision.hidden + 1) * len(self.classes)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward for one patch, attention aside."""
        vision = self.vision
        return 6.0 * (vision.layers * vision.blocks.layer_parameters(0) + self.patches.values * vision.hidden)

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of attention scores and values, forward and backward, for one patch of `seq_len`."""
        return 12.0 * self.vision.layers * self.vision.hidden * seq_len

"""Dimensions and choices of a dual encoder."""

import math
from typing import Literal

from pydantic import Field, model_validator

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.vlm.tower import PatchConfig, VisionConfig


class DualConfig(DecoderConfig):
    """Two towers. `[model]` itself is the text tower, whose blocks are the decoder's; `[model.vision]` the other."""

    family: Literal["dual"] = Field("dual", description="Model family")  # type: ignore[assignment]
    vision: VisionConfig = Field(VisionConfig(), description="Image tower")
    patches: PatchConfig = Field(PatchConfig(), description="How pictures become patches")
    features: int = Field(512, gt=0, description="Width of the space in which images and captions meet")
    image_pool: Literal["class", "mean", "map"] = Field(
        "mean",
        description="What stands for an image: its class token, the mean of its patches, or a learned query's "
        "attention to them (SigLIP)",
    )
    text_pool: Literal["end", "last"] = Field(
        "end",
        description="What stands for a caption: end: its last token, tokens see those before them (CLIP); last: "
        "the last place of the row, padding included, all see all (SigLIP)",
    )
    image_head: bool = Field(True, description="A matrix onto the features; else the tower is as wide as they are")
    text_bias: bool = Field(False, description="A bias of the text tower's matrix onto the features")
    logit_scale: float = Field(1 / 0.07, gt=0, description="Factor on similarities at the start; its log is learned")
    max_logit_scale: float = Field(100.0, ge=0, description="Most that the factor may become; 0: any (SigLIP)")
    logit_bias: float | None = Field(None, description="Learned summand of similarities at the start; unset: none")

    @model_validator(mode="after")
    def _towers(self) -> "DualConfig":
        if self.moe is not None:
            raise ValueError("model.moe: a dual encoder's towers have no experts; unset it")
        if self.vision.class_token != (self.image_pool == "class"):
            raise ValueError(
                f'model.image_pool = "{self.image_pool}" with model.vision.class_token = {self.vision.class_token}: '
                'a class token is what "class" takes, and nothing else has any; change one'
            )
        if self.vision.output_layer != -1:
            raise ValueError(
                f"model.vision.output_layer = {self.vision.output_layer}: a dual encoder takes the last; set it to -1"
            )
        if self.max_logit_scale and self.logit_scale > self.max_logit_scale:
            raise ValueError(
                f"model.logit_scale = {self.logit_scale} is above model.max_logit_scale = {self.max_logit_scale}; "
                "lower it, or set the second to 0"
            )
        if not self.image_head and self.features != self.vision.hidden:
            raise ValueError(
                f"model.features = {self.features} is not model.vision.hidden = {self.vision.hidden}; set them equal, "
                "or model.image_head = true"
            )
        return self

    def check_patches(self, patches: int, tp: int) -> None:
        if patches < 1:
            raise ValueError(f"data.patches = {patches}: a dual encoder needs the patches of one image a sample")
        if patches % tp:
            raise ValueError(
                f"parallel.tp = {tp} does not divide the {patches} patches of an image (data.patches); set it to 1, or "
                "choose another model.vision.grid"
            )

    @property
    def causal(self) -> bool:
        """Whether tokens of a caption see those before them alone."""
        return self.text_pool == "end"

    def num_parameters(self, active: bool = False) -> int:
        unused = 0 if self.tied else self.vocab_size * self.hidden  # of the decoder's head
        text = super().num_parameters(active) - unused + (self.hidden + self.text_bias) * self.features
        wide = self.vision.hidden
        image = self.vision.num_parameters(self.patches.values) + wide * self.features * self.image_head
        if self.image_pool == "map":
            vision = self.vision
            image += wide + self._map_block() + (2 if vision.norm == "layer" else 1) * wide
        return text + image + 1 + (self.logit_bias is not None)

    def _map_block(self) -> int:
        wide, ffn = self.vision.hidden, self.vision.ffn
        return 4 * wide * (wide + 1) + 2 * wide * ffn + ffn + wide

    @property
    def flops_per_token(self) -> float:
        return 6.0 * sum(self.layer_parameters(i) for i in range(self.layers))

    def attention_flops_per_token(self, seq_len: int) -> float:
        """With the image tower, shared out over the tokens of a caption; its image fills the grid."""
        text = super().attention_flops_per_token(seq_len) * (1 if self.causal else 2)
        vision, patches = self.vision, math.prod(self.vision.grid) + self.vision.class_token
        matrices = vision.layers * vision.blocks.layer_parameters(0) + self.patches.values * vision.hidden
        scores = 2.0 * vision.layers * vision.hidden * patches
        return text + 6.0 * patches * (matrices + scores) / seq_len

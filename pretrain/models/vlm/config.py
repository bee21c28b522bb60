"""Dimensions and choices of a vision-language model."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.layers.mlp import Activation
from pretrain.models.vlm.tower import PatchConfig, VisionConfig


class ConnectorConfig(BaseModel):
    """From patches to the decoder's width: the recipe's `[model.connector]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "mlp", "resampler"] = Field(
        "mlp", description="One matrix; two with a nonlinearity between; or learned queries that attend to an image"
    )
    ffn: int = Field(0, ge=0, description="Width inside the mlp; 0: the decoder's")
    activation: Activation = Field("gelu", description="Nonlinearity of the mlp")
    bias: bool = Field(True, description="Biases")
    merge: int = Field(1, gt=0, description="Patches side by side, each way, that become one token (pixel shuffle)")
    queries: int = Field(0, ge=0, description="Tokens of an image that a resampler makes")
    heads: int = Field(8, gt=0, description="Heads of a resampler")

    @model_validator(mode="after")
    def _consistent(self) -> "ConnectorConfig":
        if (self.kind == "resampler") != (self.queries > 0):
            raise ValueError(
                f"model.connector.queries = {self.queries} with kind = {self.kind!r}: a resampler needs queries, and "
                "nothing else has any"
            )
        if self.kind == "resampler" and self.merge > 1:
            raise ValueError("model.connector.merge has no meaning with a resampler; set it to 1")
        return self


class VLMConfig(DecoderConfig):
    """A decoder, and what makes its image tokens. `[model.vision]` left out: the decoder gets patches as they are
    (encoder-free: Fuyu, arXiv:2305.06500's successors SOLO and EVE)."""

    family: Literal["vlm"] = Field("vlm", description="Model family")  # type: ignore[assignment]
    vision: VisionConfig | None = Field(None, description="Vision tower; unset: patches go to the connector")
    patches: PatchConfig = Field(PatchConfig(), description="How pictures become patches")
    connector: ConnectorConfig = Field(ConnectorConfig(), description="From patches to the decoder's width")
    image_token: int = Field(0, ge=0, description="Token that stands where an image's features go")

    @model_validator(mode="after")
    def _pictures(self) -> "VLMConfig":
        if self.vision is not None and self.vision.class_token and self.connector.merge > 1:
            raise ValueError(
                f"model.connector.merge = {self.connector.merge}, but model.vision.class_token is set: it has no "
                "place among merged patches; unset one of them"
            )
        if self.connector.kind == "resampler" and self.hidden % self.connector.heads:
            raise ValueError(
                f"model.connector.heads = {self.connector.heads} does not divide model.hidden = {self.hidden}"
            )
        return self

    def check_patches(self, patches: int, tp: int) -> None:
        """Also where the patches of a row cannot be merged into whole tokens."""
        unit = self.connector.merge**2 * tp
        if patches < 1 or patches % unit:
            raise ValueError(
                f"data.patches = {patches}: must be a positive multiple of model.connector.merge ** 2 x parallel.tp = "
                f"{unit}"
            )
        if self.image_token >= self.vocab_size > 0:
            raise ValueError(
                f"model.image_token = {self.image_token} is not below model.vocab_size = {self.vocab_size}"
            )

    @property
    def patch_width(self) -> int:
        """What the connector gets of a patch."""
        return self.vision.hidden if self.vision is not None else self.patches.values

    def num_parameters(self, active: bool = False) -> int:
        tower = 0 if self.vision is None else self.vision.num_parameters(self.patches.values)
        return super().num_parameters(active) + tower + self._connector_parameters()

    def _connector_parameters(self) -> int:
        cfg, width = self.connector, self.patch_width * self.connector.merge**2
        if cfg.kind == "linear":
            return (width + cfg.bias) * self.hidden
        if cfg.kind == "mlp":
            ffn = cfg.ffn or self.hidden
            return (width + cfg.bias) * ffn + (ffn + cfg.bias) * self.hidden
        inner = self.hidden
        return inner * (cfg.queries + width + cfg.bias) + 4 * inner * (inner + cfg.bias)

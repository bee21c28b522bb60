"""Which class a picture is of: cross entropy over all classes, one target a picture.

B pictures, P patches of a row, D values of a patch, C classes.
"""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.layers.attention import AttentionMask, choose_backend
from pretrain.objectives.cross_entropy import IGNORED

MicroBatch = dict[str, Any]


class ClassificationConfig(BaseModel):
    """The recipe's `[objective]` section for pictures and their classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["classification"] = Field("classification", description="Tell a picture's class, which captions name")


class ClassificationObjective:
    """collate + count + forward + loss of classification. As `CausalObjective`; a row's first target is its class."""

    sequence: tuple[str, ...] = ("targets", "patches", "grid")
    sums = ("loss", "accuracy")

    def __init__(self, config: ClassificationConfig):
        self.config = config

    def compile(self) -> None:
        """Nothing: a picture has one row of logits."""

    def collate(self, batch: MicroBatch) -> MicroBatch:
        """Rows of a `LabelStream` -> targets, patches, grid, images and the attention mask, on the host."""
        images = batch["images"]
        if bool((images == 0).all()):  # nothing to mask: kernels without documents are faster
            mask = AttentionMask(causal=False)
        else:
            mask = AttentionMask.packed(images, causal=False)
        return {**{name: batch[name] for name in (*self.sequence, "images")}, "mask": mask}

    def describe(self, batch: MicroBatch, model: Any, precision: str, device: torch.device) -> str:
        """For the log: which attention back end the tower takes, and why."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        length, head_dim = batch["images"].shape[1], model.vision.hidden // model.vision.heads
        backend, why = choose_backend(
            batch["mask"], device=device, dtype=dtype, queries=length, keys=length, head_dim=head_dim
        )
        return f"{backend} ({why})"

    def count(self, microbatches: list[MicroBatch]) -> int:
        """Pictures with a class in these micro-batches."""
        return sum(int((batch["targets"] != IGNORED).sum()) for batch in microbatches)

    def forward(self, model: Any, batch: MicroBatch, x: Tensor | None = None) -> Tensor:
        """Hidden states [B, P, H] of the micro-batch; `x`: what the pipeline stage before this one gave."""
        return model(batch["patches"] if x is None else x, batch["grid"], batch["mask"])

    def loss(self, model: Any, hidden: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Sums over the micro-batch. accuracy: pictures whose class has the largest logit."""
        logits = model.logits(hidden, batch["images"] >= 0)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            targets = batch["targets"][:, 0].long()
            loss = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
        return {"loss": loss, "accuracy": (wide.detach().argmax(-1) == targets).sum().to(loss.dtype)}

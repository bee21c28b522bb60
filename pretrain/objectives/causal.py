"""Next-token prediction."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.models.layers.attention import AttentionMask, choose_backend
from pretrain.models.vlm.model import Pictures
from pretrain.objectives.cross_entropy import IGNORED, chunk_loss, chunked_cross_entropy

MicroBatch = dict[str, Any]


class CausalConfig(BaseModel):
    """The recipe's `[objective]` section for next-token prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["causal"] = Field("causal", description="Predict the next token")
    z_loss: float = Field(0.0, ge=0, description="Weight of logsumexp^2, which keeps logits small (1e-4 is common)")
    document_mask: bool = Field(
        True, description="Tokens see their own document only and positions restart in each; false: the whole row"
    )
    image_attention: Literal["causal", "both"] = Field(
        "causal", description="Tokens of one image see each other both ways, or as text does"
    )
    chunk_tokens: int = Field(1024, gt=0, description="Tokens whose logits exist at once")


class CausalObjective:
    """collate + count + forward + loss of next-token prediction.

    sequence: entries of a micro-batch [B, S] that context parallelism cuts, where it has them. sums: names of what
    `loss` returns.
    """

    sequence = ("tokens", "targets", "positions", "slots", "numbers")

    def __init__(self, config: CausalConfig):
        self.config = config
        self.sums = ("loss", "cross_entropy", "z_loss") if config.z_loss else ("loss",)
        self._chunk: Callable[..., Any] = chunk_loss

    def compile(self) -> None:
        """Compile what the loss computes over logits."""
        self._chunk = torch.compile(chunk_loss, dynamic=False)

    def collate(self, batch: MicroBatch) -> MicroBatch:
        """Samples of the stream -> tokens, targets, positions and the attention mask, on the host."""
        kept: MicroBatch = {name: batch[name] for name in ("tokens", "targets", "positions", "slots") if name in batch}
        if "patches" in batch:
            kept["pictures"] = Pictures.packed(batch["patches"], batch["images"], batch["grid"])
        if not self.config.document_mask:
            length = batch["tokens"].shape[1]
            return {**kept, "positions": torch.arange(length)[None], "mask": AttentionMask()}
        mask = AttentionMask.packed(batch["documents"])
        if self.config.image_attention == "both" and "spans" in batch:
            mask = replace(mask, spans=batch["spans"])
        return {**kept, "mask": mask}

    def by_document(self, batch: MicroBatch, numbers: Tensor, total: int, dtype: torch.dtype) -> MicroBatch:
        """A collated batch whose `loss` is one sum a document: [total]. numbers: of the document of each token [B, S],
        -1 for none.
        """
        return {**batch, "numbers": numbers, "sums": torch.zeros(total, dtype=dtype)}

    def describe(self, batch: MicroBatch, model: Any, precision: str, device: torch.device) -> str:
        """For the log: which attention back end this batch takes, and why."""
        length = batch["tokens"].shape[1]
        name, reason = choose_backend(
            batch["mask"],
            device=device,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            queries=length,
            keys=length,
            head_dim=model.dim_per_head,
            value_dim=model.value_dim,
            softcap=model.attention_softcap or None,
        )
        return f"{name} ({reason})"

    def count(self, microbatches: list[MicroBatch]) -> int:
        """Valid targets in these micro-batches: what the sum of losses is divided by."""
        return sum(int((batch["targets"] != IGNORED).sum()) for batch in microbatches)

    def forward(self, model: Any, batch: MicroBatch, x: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, E] of the micro-batch; `x`: what the pipeline stage before this one gave."""
        pictures = {name: batch[name] for name in ("pictures", "slots") if name in batch}
        return model(batch["tokens"] if x is None else x, batch["mask"], batch["positions"], **pictures)

    def loss(self, model: Any, hidden: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Sums over the micro-batch. "loss" is what is differentiated; the others are its parts, for the log."""
        nll, z_sum, losses = chunked_cross_entropy(
            hidden,
            model.head.weight,
            batch["targets"],
            softcap=model.cfg.logit_softcap,
            z_loss=self.config.z_loss,
            chunk_tokens=self.config.chunk_tokens,
            chunk=self._chunk,
        )
        if "numbers" in batch:
            of_any = torch.where(batch["numbers"] >= 0, losses, 0.0).to(batch["sums"].dtype)
            index = batch["numbers"].clamp(min=0).flatten().long()
            sums = torch.zeros_like(batch["sums"]).index_add(0, index, of_any.flatten())
            return dict.fromkeys(self.sums, sums)
        if not self.config.z_loss:
            return {"loss": nll}
        return {"loss": nll + z_sum, "cross_entropy": nll.detach(), "z_loss": z_sum.detach()}

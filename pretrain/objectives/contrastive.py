"""Contrastive learning of images and texts: each sample's pair against those of all data ranks.

    softmax   CLIP (arXiv:2103.00020): which text is this image's, which image this text's; mean of the two
    sigmoid   SigLIP (arXiv:2303.15343): of every pair whether it is one

The similarities of a process's own samples with everyone's are made chunk by chunk; their full matrix never exists.
n own samples, N of all data ranks, D width of a feature.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from parallel.across import Gather, alone
from pretrain.models.layers.attention import AttentionMask, choose_backend
from pretrain.models.vlm.model import Pictures
from pretrain.objectives.cross_entropy import (
    IGNORED,
    ChunkResult,
    Vocabulary,
    chunk_loss,
    chunked_cross_entropy,
)

MicroBatch = dict[str, Any]
UNSEEN = -1e4  # added to a similarity: exp of it is 0


class ContrastiveConfig(BaseModel):
    """The recipe's `[objective]` section for pairs of an image and a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["contrastive"] = Field("contrastive", description="Match images and texts")
    loss: Literal["softmax", "sigmoid"] = Field("softmax", description="CLIP's or SigLIP's")
    chunk_rows: int = Field(1024, gt=0, description="Samples whose similarities with all others exist at once")


class ContrastiveObjective:
    """collate + count + forward + loss of contrastive learning. As `CausalObjective`; `gather`: set by the engine.

    The model gives features [B, 2, D], and has `temperature`, the factor and summand that make cosines logits.
    """

    sequence: tuple[str, ...] = ()
    sums = ("loss", "scale")

    def __init__(self, config: ContrastiveConfig):
        self.config = config
        self.gather: Gather = alone
        self._chunk: Callable[..., ChunkResult] = CHUNKS[config.loss]

    def across(self, gather: Gather) -> None:
        """Samples are compared with those that `gather` brings."""
        self.gather = gather

    def compile(self) -> None:
        """Compile what the loss computes over similarities."""
        self._chunk = torch.compile(self._chunk, dynamic=False)

    def collate(self, batch: MicroBatch) -> MicroBatch:
        """Pairs of the stream, one a row -> pictures, tokens, lengths [B] in tokens, valid [B], on the host.

        A row without a picture or without a text is no pair: it counts for nothing.
        """
        images, lengths = batch["images"], (batch["documents"] >= 0).sum(1)
        if bool((images == 0).all()):  # nothing to mask: kernels without documents are faster
            pictures = Pictures(batch["patches"], images, batch["grid"], AttentionMask(causal=False))
        else:
            pictures = Pictures.packed(batch["patches"], images, batch["grid"])
        valid = (lengths > 0) & (images >= 0).any(1)
        return {"tokens": batch["tokens"], "lengths": lengths, "pictures": pictures, "valid": valid}

    def describe(self, batch: MicroBatch, model: Any, precision: str, device: torch.device) -> str:
        """For the log: which attention back ends the towers take, and why."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        images, tower = batch["pictures"], model.vision
        said = []
        for name, mask, length, head_dim in (
            ("images", images.mask, images.images.shape[1], tower.hidden // tower.heads),
            ("texts", AttentionMask(causal=model.causal), batch["tokens"].shape[1], model.dim_per_head),
        ):
            backend, why = choose_backend(
                mask, device=device, dtype=dtype, queries=length, keys=length, head_dim=head_dim
            )
            said.append(f"{name}: {backend} ({why})")
        return "; ".join(said)

    def count(self, microbatches: list[MicroBatch]) -> int:
        """Pairs in these micro-batches."""
        return sum(int(batch["valid"].sum()) for batch in microbatches)

    def forward(self, model: Any, batch: MicroBatch, x: Tensor | None = None) -> Tensor:
        """Features [B, 2, D] of the images and of the texts, of length 1."""
        return model(batch["pictures"], batch["tokens"], batch["lengths"])

    def loss(self, model: Any, hidden: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Sums over the micro-batch. scale: of the similarities, once a pair."""
        # Similarities reach 100, where bf16 has steps of 0.5.
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            scale, bias = model.temperature(wide)
            images, texts = wide.unbind(1)
            loss = self.compare(images, texts, batch["valid"], scale, bias)
        return {"loss": loss, "scale": (scale.detach() * batch["valid"].sum()).sum()}

    def compare(self, images: Tensor, texts: Tensor, valid: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Sum of the losses of the own pairs: images, texts [n, D] of length 1, valid [n]; scale, bias [1] of the
        similarities.
        """
        # bias, and that a sample is none, as one more dim of the features: similarities stay one matrix product.
        last = torch.where(valid, bias.to(texts.dtype), UNSEEN)[:, None]
        if self.config.loss == "sigmoid":
            everyone, first = self.gather(torch.cat((texts, last), dim=1))
            return self._one_way(images * scale, everyone, first, valid)
        both = torch.stack([torch.cat((features, last), dim=1) for features in (images, texts)], dim=1)
        everyone, first = self.gather(both)
        of_images = self._one_way(images * scale, everyone[:, 1], first, valid)
        of_texts = self._one_way(texts * scale, everyone[:, 0], first, valid)
        return (of_images + of_texts) / 2

    def _one_way(self, own: Tensor, everyone: Tensor, first: int, valid: Tensor) -> Tensor:
        """own [n, D] against everyone [N, D + 1], of which own sample i belongs with first + i."""
        rows = torch.cat((own, own.new_ones(len(own), 1)), dim=1)
        targets = torch.arange(first, first + len(own), device=own.device).where(valid, IGNORED)
        loss, _, _ = chunked_cross_entropy(
            rows[None], everyone, targets[None], chunk_tokens=self.config.chunk_rows, chunk=self._chunk
        )
        return loss


def sigmoid_chunk(logits: Tensor, targets: Tensor, softcap: float, z_loss: float, part: Vocabulary) -> ChunkResult:
    """As `cross_entropy.chunk_loss`, of -log sigmoid(+-logits) over all pairs: + where the column is the target."""
    assert not softcap and not z_loss and part.mesh is None
    columns = torch.arange(logits.shape[-1], device=logits.device)
    sign = (columns == targets[:, None]).to(logits.dtype) * 2 - 1
    sign = sign.masked_fill((targets == IGNORED)[:, None], 0.0)
    signed = sign * logits
    loss = torch.where(sign == 0, 0.0, F.softplus(-signed)).sum(1)
    return loss, torch.zeros_like(loss), -sign * torch.sigmoid(-signed)


CHUNKS: dict[str, Callable[..., ChunkResult]] = {"softmax": chunk_loss, "sigmoid": sigmoid_chunk}

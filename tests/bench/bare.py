"""What benchmarks against bare libraries share: a decoder with its loss but no engine, and something to train on."""

from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.models import FAMILIES


class WithLoss(torch.nn.Module):
    """The recipe's decoder, weights drawn anew; called with a micro-batch it gives the sum of the loss over targets."""

    def __init__(self, settings: RunConfig, objective: Any):
        super().__init__()
        self.model: Any = FAMILIES["decoder"].build(settings.model)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.02)
        self._objective = objective

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self._objective.loss(self.model, self._objective.forward(self.model, batch), batch)["loss"]
        return loss


def random_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """One document a row, as the Trainer's rows are; other ones on each process."""
    tokens = torch.randint(0, 8192, (rows, length + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    zeros = torch.zeros(rows, length, dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32).expand(rows, length)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "documents": zeros}
    return {name: value.contiguous() for name, value in batch.items()}

"""A small model that keeps the model contract, for tests of the pipeline alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.plan import Plan

VOCABULARY, WIDTH = 13, 8


class SmallModel(nn.Module):
    """embed, layers that mix features and positions, norm, head."""

    def __init__(self, layers: int, tied: bool = False):
        super().__init__()
        self.tied = tied
        self.embed: nn.Module | None = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): SmallBlock() for i in range(layers)})
        self.norm: nn.Module | None = nn.LayerNorm(WIDTH)
        self.head: nn.Module | None = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.tied and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.layers.values():
            x = block(x)
        return x if self.norm is None else self.norm(x)


class SmallBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + 0.3 * x.cumsum(1)
        return x + self.down(torch.tanh(self.up(self.norm(mixed))))


def forward(model: Any, batch: dict[str, Any], x: Tensor | None = None) -> Tensor:
    return model(batch["tokens"] if x is None else x)


def loss(model: Any, hidden: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    logits = model.head(hidden).flatten(0, 1)
    nll = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")
    square = logits.square().sum()
    return {"loss": nll + 1e-3 * square, "square": square.detach()}


def plan(tied: bool = False) -> Plan:
    return Plan(
        blocks="layers.*",
        first=("embed",),
        last=("norm", "head"),
        tied={"head.weight": "embed.weight"} if tied else {},
    )


def batches(number: int, rows: int = 2, length: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Micro-batches with an entry that is no tensor, as an attention mask is none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
        made.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": object()})
    return made

"""Steps whose loss stands out, and what their documents cost."""

import json
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.ledger import Record
from data_pipeline.loader import to_torch
from data_pipeline.mix import MixedStream
from data_pipeline.pack import IGNORED
from parallel.engine import Engine
from pretrain.config import RunConfig
from pretrain.data import Dataset
from pretrain.mixture import describe, number_documents

SPIKES = "spikes.jsonl"
DEVIATION = 1.4826  # of a normal distribution, over its median absolute deviation
WINDOW, ENOUGH = 100, 30  # losses that a step's is compared with; how many there must be
LEAST = 0.002  # of the median: what losses deviate at least


class Spikes:
    """Says which losses stand out above those before them; equal on all ranks, as the losses are.

    threshold: robust z-score from which one does, (loss - median) / (1.4826 x median absolute deviation); 0: none does.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float | None) -> float:
        """The z-score of a loss that stands out, else 0; the loss joins those that later ones are compared with."""
        if loss is None or not self.threshold:
            return 0.0
        score = 0.0
        if len(self._losses) >= ENOUGH:
            middle = median(self._losses)
            spread = median(abs(one - middle) for one in self._losses)
            score = (loss - middle) / max(DEVIATION * spread, LEAST * abs(middle), 1e-12)
        self._losses.append(loss)
        return score if score >= self.threshold else 0.0


class StepLosses(NamedTuple):
    """Of the documents of a step [n]: sums of the loss in nats, and numbers of targets. None: not told apart."""

    record: Record
    losses: np.ndarray | None
    targets: np.ndarray | None


def document_losses(engine: Engine, objective: Any, stream: MixedStream, config: RunConfig, first: int) -> StepLosses:
    """Losses of the documents of the step that begins with sample `first`, without gradients. Collective.

    An objective whose loss is not of one document each (contrastive) gives none.
    """
    record = stream.documents(first, config.train.global_batch)
    if not hasattr(objective, "by_document"):
        return StepLosses(record, None, None)
    per_rank = config.train.global_batch // engine.data_world
    begin = engine.data_rank * per_rank
    samples = to_torch(stream.read(first + begin, per_rank))
    numbers = number_documents(record, samples["documents"].numpy(), begin)
    total, size = len(record.rows), config.train.micro_batch
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    batches = []
    for rows in (slice(cut, cut + size) for cut in range(0, per_rank, size)):
        batch = objective.collate({name: tensor[rows] for name, tensor in samples.items()})
        batches.append(objective.by_document(batch, torch.from_numpy(numbers[rows]), total, dtype))
    sums = engine.evaluate(batches)
    targets = np.bincount(numbers[samples["targets"].numpy() != IGNORED], minlength=total)
    counts = engine.sum_over_data(torch.from_numpy(targets))
    losses = sums.get("cross_entropy", sums["loss"])
    return StepLosses(record, losses.double().cpu().numpy(), counts.cpu().numpy())


def rows_of(found: StepLosses, names: list[str], datasets: dict[str, Dataset]) -> list[dict[str, Any]]:
    """A step's documents for a person, costliest target first: source, shard, key, start, targets, loss a target."""
    rows = [document._asdict() for document in describe(found.record, names, datasets)]
    if found.losses is None or found.targets is None:
        return rows
    for row, loss, targets in zip(rows, found.losses.tolist(), found.targets.tolist(), strict=True):
        row |= {"targets": targets, "loss": loss / targets if targets else None}
    return sorted(rows, key=lambda row: -(row["loss"] or 0.0))


def write_spike(
    run_dir: Path,
    step: int,
    loss: float,
    score: float,
    found: StepLosses,
    names: list[str],
    datasets: dict[str, Dataset],
) -> None:
    """Add a line to the run's spikes.jsonl."""
    line = {"step": step, "loss": loss, "score": score, "documents": rows_of(found, names, datasets)}
    with (run_dir / SPIKES).open("a") as file:
        file.write(json.dumps(line) + "\n")

"""Loss on held-out documents."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from data_pipeline.loader import held_out_batches
from parallel.engine import Engine
from pretrain.config import RunConfig
from pretrain.data import Dataset, make_stream


def held_out_loss(
    engine: Engine,
    objective: Any,
    dataset: Dataset,
    config: RunConfig,
    watch: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, float]:
    """{"eval_loss": nats a token, "eval_accuracy": where that is counted, "eval_bits_per_byte": where the shards
    say their text's bytes}. Collective.

    `watch` passes the micro-batches on, and may show how far they are.
    """
    stream = make_stream(config, dataset, shuffle=False)
    batches = [
        objective.collate(batch)
        for batch in held_out_batches(
            stream,
            micro_batch=config.train.micro_batch,
            rank=engine.data_rank,
            world=engine.data_world,
            max_samples=config.eval.max_samples,
        )
    ]
    sums = engine.evaluate(watch(batches))
    count = int(engine.sum_over_data(torch.tensor(objective.count(batches))))
    if not count:
        raise ValueError(f"eval.shards = {config.eval.shards!r} hold no target to take a loss at")
    loss = float(sums.get("cross_entropy", sums["loss"])) / count
    result = {"eval_loss": loss}
    if "accuracy" in sums:
        result["eval_accuracy"] = float(sums["accuracy"]) / count
    if bytes_per_token := getattr(dataset, "bytes_per_token", None):
        result["eval_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return result

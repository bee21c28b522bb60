"""A rank of `pretrain` with a fault: `python -m tests.launch.planted FAULT RANK run ...`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints.store
import pretrain.train
from launch.cli import main

FOR_EVER = 1000.0


def sleep_before_step() -> None:
    """In the third step, before its first collective."""
    step, count = pretrain.train.train_step, iter(range(1000))

    def planted(*args: Any) -> Any:
        if next(count) == 2:
            time.sleep(FOR_EVER)
        return step(*args)

    pretrain.train.train_step = planted


def slow_forward() -> None:
    """0.3 s more in every step."""
    build = pretrain.train.build_engine

    def planted(config: Any, world: Any, objective: Any, compiling: bool = False) -> Any:
        forward = type(objective).forward

        def slow(self: Any, *args: Any) -> Any:
            time.sleep(0.3)
            return forward(self, *args)

        type(objective).forward = slow
        return build(config, world, objective, compiling)

    pretrain.train.build_engine = planted


def shard_without_end() -> None:
    """Shards turn into pipes that nobody writes to, once their indexes are read."""
    make_loader = pretrain.train.make_loader

    def planted(config: Any, *args: Any) -> Any:
        for path in Path(config.data.sources[0].shards).parent.glob("*.tar"):
            path.unlink()
            os.mkfifo(path)
        return make_loader(config, *args)

    pretrain.train.make_loader = planted


def save_without_end() -> None:
    """The disk stops answering in the first save."""
    checkpoints.store.CheckpointStore.save = lambda *_, **__: time.sleep(FOR_EVER)  # type: ignore[method-assign]
    checkpoints.store.CheckpointStore.save_async = lambda *_, **__: time.sleep(FOR_EVER)  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, *argv = sys.argv[1:]
    if os.environ["RANK"] == rank and fault != "none":
        globals()[fault]()
    sys.argv = ["pretrain", *argv]
    sys.exit(main(argv))

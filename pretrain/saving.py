"""When a run saves, and what it says of it."""

import math
import time
from contextlib import nullcontext
from typing import Any

from checkpoints.state import rng_state
from checkpoints.store import CheckpointStore
from parallel.engine import Engine
from pretrain.metrics import Metrics
from pretrain.sections import CheckpointConfig


class Saver:
    """Saves what the engine holds, in the background where the recipe says so. metrics: on rank 0 alone.

    Creating it, `save` and `finish` are collective.
    """

    def __init__(
        self, store: CheckpointStore, engine: Engine, config: CheckpointConfig, metrics: Metrics | None
    ) -> None:
        self.store, self._engine, self._config, self._metrics = store, engine, config, metrics
        self._measured: tuple[int, dict[str, float]] = (0, {})
        self._since, self._asked = time.monotonic(), False
        if config.in_background:
            state = engine.state_dict()
            store.prepare(state["model"], state["optimizer"], ties=engine.ties)

    def late(self) -> bool:
        """Whether `every_minutes` are over on this rank's clock; true once for each save that follows."""
        over = 0 < self._config.every_minutes * 60 <= time.monotonic() - self._since and not self._asked
        self._asked |= over
        return over and self._metrics is not None  # one clock decides

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Numbers of an evaluation, by which a checkpoint of the same step may be among the best."""
        self._measured = (step, {key: value for key, value in values.items() if math.isfinite(value)})

    def save(self, step: int, state: dict[str, Any], *, last: bool) -> None:
        """The checkpoint of `step`. In the foreground a failure is raised; in the background `report` names it."""
        if self._measured[0] == step:
            state = {**state, "metrics": self._measured[1]}
        tensors = self._engine.state_dict()
        given: dict[str, Any] = {**tensors, "ties": self._engine.ties, "rank_state": {"rng": rng_state()}}
        with nullcontext() if self._metrics is None else self._metrics.paused():
            if self._config.in_background:
                skip = self._config.busy == "skip" and not last
                if not self.store.save_async(step, state=state, **given, skip_if_busy=skip):
                    self._say(f"step {step} is not saved: the save before is still being written")
            else:
                self._say(f"saved {self.store.save(step, state=state, **given)}")
        self._since, self._asked = time.monotonic(), False

    def report(self) -> None:
        """Says how saves in the background went that have ended since."""
        for report in self.store.reports():
            self._say(str(report))

    def finish(self) -> None:
        """Waits for the last save; one that failed is tried again, and raised where it fails again."""
        with nullcontext() if self._metrics is None else self._metrics.paused():
            self.store.finish()
        self.report()

    def _say(self, text: str) -> None:
        if self._metrics is not None:
            self._metrics.print(text)

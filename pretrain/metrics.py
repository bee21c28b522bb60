"""What a run shows while it trains: console, metrics.jsonl, TensorBoard. Used by rank 0's loop."""

import json
import math
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from parallel.hardware import peak_memory
from pretrain.router_health import Routed, RouterHealth, image_record

Values = Mapping[str, Tensor | float]
IMAGES = 10  # heat maps every so many points, less often once they are long
ON_CONSOLE = ("balance_loss", "load_max", "dead")  # of the routers' figures


class HostCopy:
    """Numbers on their way off the device: making one waits for nothing, `read` waits for that copy alone.

    A plain `.item()` would wait for everything that was queued since, the next step included. CPU tensors are kept as
    they are and must not be written to before `read`.
    """

    def __init__(self, values: Values):
        self._values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
        self._copied: torch.cuda.Event | None = None
        on_device = {k: v for k, v in self._values.items() if isinstance(v, Tensor) and v.is_cuda}
        if on_device:
            joined = torch.cat([value.double().flatten() for value in on_device.values()])
            host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
            host.copy_(joined, non_blocking=True)
            parts = host.split([value.numel() for value in on_device.values()])
            self._values |= {k: part.view(on_device[k].shape) for k, part in zip(on_device, parts, strict=True)}
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """The scalars."""
        self._wait()
        scalars = {k: v for k, v in self._values.items() if not isinstance(v, Tensor) or v.ndim == 0}
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in scalars.items()}

    def tables(self) -> dict[str, NDArray[np.float64]]:
        """The tensors that have dims."""
        self._wait()
        return {k: v.double().numpy() for k, v in self._values.items() if isinstance(v, Tensor) and v.ndim > 0}

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


class Metrics:
    """Takes each step's numbers, reads them one step late, writes them everywhere.

    One call later the device has finished that step and works on the following one, so the loop does not wait.
    A sink that fails (disk full, closed pipe) is named once and left alone: training goes on.

    Steps count from 1: `log(step)` belongs to the update after which `step` steps are done.

    Args:
        run_dir: gets `metrics.jsonl` (every step, one JSON object a line; NaN and infinity become null) and
            `tensorboard/`.
        tokens_per_step: tokens of one global batch.
        flops_per_step: model FLOPs of one global batch, forward and backward.
        peak_flops: the peak of all devices of the job together, FLOP/s; None (unknown): no MFU is shown.
        device: whose memory is shown.
        every: console line and TensorBoard point every so many steps (and at the first and last).
        tensorboard: write TensorBoard scalars.
        routers: reads what the routers of a mixture of experts did; None: the model has none.
        console: where lines go. A progress bar is drawn only on a terminal and outside CI.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tokens_per_step: int,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        device: torch.device | str = "cpu",
        every: int = 10,
        tensorboard: bool = True,
        routers: RouterHealth | None = None,
        console: Console | None = None,
    ):
        self.run_dir = run_dir
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self.device = torch.device(device)
        self.every = every
        self.console = console or Console(highlight=False)
        self.routers = routers
        self._points = 0
        self._tensorboard = tensorboard
        self._pending: tuple[int, float, HostCopy] | None = None
        self._failed: set[str] = set()

    def start(self, done: int, total: int) -> None:
        """Begin or continue a run of `total` steps of which `done` are taken.

        Lines and points of later steps, left by a run that died after its last checkpoint, are dropped: those
        steps come again.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        drop_after(path, done)
        if self.routers is not None:
            self.routers.restore(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._writer: Any = None
        if self._tensorboard:
            # Costs 0.2 s, so only runs that want it pay.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=done + 1)
        self._first, self._total = done + 1, total
        self._last = self._window_start = time.perf_counter()
        self._window_done = done
        self._progress: Progress | None = None
        if self.console.is_terminal and not os.environ.get("CI"):
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=2)
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def log(self, step: int, values: Values) -> None:
        """Take step `step`'s numbers: `loss`, `lr`, `grad_norm`, ...; scalars, and what `RouterHealth.read` takes.

        Returns at once; the step before is written now. Adds `seconds` (wall clock since the last call) and
        `tokens_per_s`.
        """
        self._write_pending()
        now = time.perf_counter()
        self._pending = (step, now - self._last, HostCopy(values))
        self._last = now

    def log_eval(self, step: int, values: Values) -> None:
        """Write an evaluation's numbers (`eval_loss`, ...) after `step` steps, at once."""
        self._write_pending()
        numbers = HostCopy(values).read()
        self._write_line(step, numbers)
        self._write_points(step, numbers)
        self.print("  ".join([f"eval at step {step}", *(f"{k} {v:.4f}" for k, v in numbers.items())]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluating, saving) counts neither as step time nor against throughput."""
        self._write_pending()  # waits for the step in flight, which is no part of the pause
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._last += spent
            self._window_start += spent

    def print(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        with self._tolerate("console"):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Write what is held and close the files."""
        self._write_pending()
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        self._file.close()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        step, seconds, held = self._pending
        self._pending = None
        numbers = held.read()
        rate = self.tokens_per_step / max(seconds, 1e-9)
        due = step % self.every == 0 or step in (self._first, self._total)
        routed = self.routers.read(held.tables()) if self.routers is not None else None
        line = {**numbers, **_named(routed), "seconds": round(seconds, 6), "tokens_per_s": round(rate, 1)}
        if due:
            line["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        self._write_line(step, line, routed.rounded_load() if routed is not None and due else None)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if due:
            self._show(step, numbers, _named(routed, ON_CONSOLE))
            if routed is not None:
                self._show_routers(step, routed)

    def _show_routers(self, step: int, routed: Routed) -> None:
        """Warnings, and TensorBoard's points and images below `router/`."""
        assert self.routers is not None
        for text in self.routers.warnings(routed):
            self.print(text)
        self.routers.remember(routed)
        self._points += 1
        if self._writer is None:
            return
        points = {f"router/{name}": value for name, value in routed.overall.items()}
        for name, values in routed.by_layer.items():
            points |= {f"router/{name}/layer_{i}": v for i, v in zip(self.routers.layers, values, strict=True)}
        self._write_points(step, points)
        if self._points >= max(IMAGES, self.routers.points // 4) or step == self._total:
            self._points = 0
            with self._tolerate("tensorboard"):
                for layer, png in self.routers.heat_maps():
                    self._writer.file_writer.add_summary(image_record(f"router/load/layer_{layer}", png), step)

    def _show(self, step: int, numbers: dict[str, float], of_routers: dict[str, float]) -> None:
        """Console line and TensorBoard points; speed is the mean since the last ones."""
        seconds = max(self._last - self._window_start, 1e-9) / (step - self._window_done)
        self._window_start, self._window_done = self._last, step
        shown = {**numbers, "tokens_per_s": self.tokens_per_step / seconds}
        if self.peak_flops and self.flops_per_step:
            shown["mfu"] = self.flops_per_step / seconds / self.peak_flops
        shown["memory_gb"] = peak_memory(self.device) / 1e9
        self._write_points(step, shown)
        eta = timedelta(seconds=round((self._total - step) * seconds))
        width = len(str(self._total))
        fields = [_field(k, v) for k, v in {**numbers, **of_routers, **shown}.items()]
        self.print("  ".join([f"step {step:>{width}}/{self._total}", *fields, f"ETA {eta}"]))

    def _write_line(self, step: int, numbers: dict[str, float], load: list[list[float]] | None = None) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        loads = {} if load is None else {"router_load": load}
        with self._tolerate("metrics.jsonl"):
            self._file.write(json.dumps({"step": step, **finite, **loads}) + "\n")

    @contextmanager
    def _tolerate(self, sink: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if sink not in self._failed:
                with suppress(OSError):
                    print(f"pretrain: warning: {sink} cannot be written ({error}); training goes on", file=sys.stderr)
            self._failed.add(sink)

    def _write_points(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is not None:
            with self._tolerate("tensorboard"):
                # One record for all: several times as fast as add_scalar for each.
                self._writer.file_writer.add_summary(_scalars(numbers), step)


def drop_after(path: Path, done: int) -> None:
    """Remove lines of steps beyond `done`, and a torn last line, from the metrics file `path`, if any."""
    if not path.exists():
        return
    kept = path.with_name(path.name + ".part")
    with path.open(encoding="utf-8", errors="replace") as old, kept.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if (step := step_of(line)) is not None and step <= done)
    kept.replace(path)


def step_of(line: str) -> int | None:
    """The step of one line of metrics.jsonl; None when the line is torn or no such line."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _named(routed: Routed | None, only: Container[str] | None = None) -> dict[str, float]:
    """The figures of routers as metrics.jsonl calls them."""
    if routed is None:
        return {}
    chosen = {k: v for k, v in routed.overall.items() if only is None or k in only}
    return {k if k.endswith("_loss") else f"router_{k}": v for k, v in chosen.items()}


def _scalars(numbers: Mapping[str, float]) -> Any:
    """TensorBoard's record of scalars."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])


def _field(key: str, value: float) -> str:
    formats = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad norm {:.3f}",
        "tokens_per_s": "{:,.0f} tokens/s",
        "memory_gb": "{:.2f} GB",
        "balance_loss": "balance {:.4f}",
        "router_load_max": "load max/mean {:.2f}",
        "router_dead": "dead {:.0f}",
    }
    if key == "mfu":
        return f"MFU {100 * value:.1f} %"
    return formats.get(key, key.replace("{", "{{").replace("}", "}}") + " {:.4g}").format(value)

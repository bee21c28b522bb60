"""Metrics: read one step late, written everywhere, whole after a kill and a resume."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain import metrics as module
from pretrain.metrics import HostCopy, Metrics


class Clock:
    """Stands in for the `time` module: moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Run:
    """A run in `folder` whose steps take 0.5 s each."""

    def __init__(self, folder: Path, clock: Clock, **settings: Any):
        self.folder, self.clock, self.text = folder, clock, io.StringIO()
        settings = {"tokens_per_step": 1000, "every": 2, "tensorboard": False, **settings}
        self.metrics = Metrics(folder, console=Console(file=self.text, width=200), **settings)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.clock.now += 0.5
            self.metrics.log(step, {"loss": torch.tensor(float(step)), "lr": 0.1})

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def test_values_are_read_one_step_late_and_all_are_written(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock)
    run.metrics.start(0, 3)
    loss = torch.tensor(7.0, requires_grad=True)
    run.metrics.log(1, {"loss": loss})
    assert run.lines() == []
    clock.now += 1
    run.metrics.log(2, {"loss": 5.0})
    assert [line["step"] for line in run.lines()] == [1]
    run.metrics.close()
    assert [(line["step"], line["loss"]) for line in run.lines()] == [(1, 7.0), (2, 5.0)]


def test_log_does_not_touch_the_values_it_is_given(tmp_path: Path, clock: Clock) -> None:
    class Unread(torch.Tensor):
        def item(self) -> float:
            raise AssertionError("read too early")

    run = Run(tmp_path, clock)
    run.metrics.start(0, 3)
    run.metrics.log(1, {"loss": torch.tensor(1.0).as_subclass(Unread)})
    with pytest.raises(AssertionError, match="read too early"):
        run.metrics.log(2, {"loss": 1.0})


def test_speed_leaves_pauses_out(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock, flops_per_step=1e12, peak_flops=10e12)
    run.metrics.start(0, 4)
    run.steps(1, 2)
    with run.metrics.paused():
        clock.now += 60
        run.metrics.log_eval(2, {"eval_loss": 2.5})
    run.steps(3, 4)
    run.metrics.close()
    steps = [line for line in run.lines() if "loss" in line]
    assert [line["seconds"] for line in steps] == [0.5] * 4
    assert [line["tokens_per_s"] for line in steps] == [2000.0] * 4
    assert {"step": 2, "eval_loss": 2.5} in run.lines()
    assert run.text.getvalue().count("2,000 tokens/s  MFU 20.0 %") == 3  # steps 1, 2 and 4


def test_plain_lines_for_the_first_every_nth_and_last_step(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock, every=3)
    run.metrics.start(0, 7)
    run.steps(1, 7)
    run.metrics.close()
    shown = run.text.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/7", "3/7", "6/7", "7/7"]
    assert shown[1].startswith("step 3/7  loss 3.0000  lr 1.00e-01  2,000 tokens/s  ")
    assert shown[1].endswith("ETA 0:00:02")
    assert "MFU" not in run.text.getvalue() and "\x1b" not in run.text.getvalue()


@pytest.mark.parametrize(("ci", "bar"), [("", True), ("true", False)])
def test_a_bar_on_a_terminal_but_not_in_ci(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, ci: str, bar: bool
) -> None:
    monkeypatch.setenv("CI", ci)
    run = Run(tmp_path, clock)
    run.metrics.console = Console(file=run.text, force_terminal=True, width=100)
    run.metrics.start(0, 2)
    run.steps(1, 2)
    run.metrics.print("saved [checkpoint]")
    run.metrics.close()
    assert ("━" in run.text.getvalue()) is bar
    assert "saved [checkpoint]" in run.text.getvalue()


def test_resume_drops_what_will_run_again_and_a_torn_line(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock)
    run.metrics.start(0, 9)
    run.steps(1, 5)
    run.metrics.log_eval(4, {"eval_loss": 4.0})
    run.metrics.log_eval(5, {"eval_loss": 5.0})
    run.metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    again = Run(tmp_path, clock)
    again.metrics.start(4, 9)
    again.steps(5, 6)
    again.metrics.close()
    assert [line["step"] for line in again.lines()] == [1, 2, 3, 4, 4, 5, 6]
    assert sum("eval_loss" in line for line in again.lines()) == 1
    assert "step 5/9" in again.text.getvalue()


def test_a_killed_run_has_every_step_but_the_one_held(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock)
    run.metrics.start(0, 9)
    run.steps(1, 4)  # no close
    assert [line["step"] for line in run.lines()] == [1, 2, 3]


def test_not_a_number_is_valid_json(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock)
    run.metrics.start(0, 2)
    run.metrics.log(1, {"loss": torch.tensor(float("nan")), "grad_norm": float("inf")})
    run.metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["loss"], line["grad_norm"]) == (None, None)
    assert "loss nan" in run.text.getvalue()


def test_tensorboard_reads_back_and_forgets_steps_that_ran_again(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock, tensorboard=True)
    run.metrics.start(0, 8)
    run.steps(1, 6)
    run.metrics.log_eval(6, {"eval_loss": 6.5})
    run.metrics.close()
    again = Run(tmp_path, clock, tensorboard=True)
    again.metrics.start(3, 8)
    again.metrics.log(4, {"loss": 40.0})
    again.metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (4, 40.0)]
    assert events.Scalars("tokens_per_s")[1].value == 2000
    assert events.Scalars("eval_loss") == []


def test_scalars_and_tables_are_told_apart_by_dims() -> None:
    held = HostCopy({"loss": torch.tensor(2.0), "lr": 0.1, "one": torch.tensor([3.0]), "rows": torch.ones(2, 3)})
    assert held.read() == {"loss": 2.0, "lr": 0.1}
    assert {name: table.shape for name, table in held.tables().items()} == {"one": (1,), "rows": (2, 3)}


def test_a_dense_model_says_nothing_of_routers(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock, tensorboard=True)
    run.metrics.start(0, 2)
    run.steps(1, 2)
    run.metrics.close()
    assert all(list(line) == ["step", "loss", "lr", "seconds", "tokens_per_s", "memory_gb"] for line in run.lines())
    assert run.text.getvalue().splitlines()[0].startswith("step 1/2  loss 1.0000  lr 1.00e-01  2,000 tokens/s  ")
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert set(tags["scalars"]) == {"loss", "lr", "tokens_per_s", "memory_gb"} and not tags["images"]

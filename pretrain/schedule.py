"""Learning-rate schedules: pure functions of the step."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ScheduleConfig(BaseModel):
    """The recipe's `[schedule]` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="shape after warmup; wsd = warmup, stable, decay"
    )
    warmup: int = Field(default=0, ge=0, description="linear warmup, steps")
    min_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="learning rate at the end, as a fraction of the peak (not for constant)",
    )
    decay: int = Field(
        default=0, ge=0, description="wsd only: length of the final decay, steps; 0 = a tenth of the run"
    )
    decay_shape: Literal["linear", "sqrt"] = Field(
        default="linear", description="wsd only: linear, or sqrt = 1 - sqrt(progress)"
    )


def decay_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Length of the wsd decay in steps, at least 1."""
    return schedule.decay or max(1, total_steps // 10)


def check_schedule(schedule: ScheduleConfig, total_steps: int) -> None:
    """Raise ValueError when the phases of `schedule` do not fit into a run of `total_steps` steps."""
    if schedule.name != "wsd" and schedule.decay:
        raise ValueError(
            f"schedule.decay is {schedule.decay} but schedule.name {schedule.name!r} has no decay phase: "
            f'set it to 0, or schedule.name to "wsd"'
        )
    if schedule.warmup > total_steps:
        raise ValueError(
            f"schedule.warmup is {schedule.warmup} steps but the run has train.steps = {total_steps}: "
            f"set schedule.warmup to {total_steps} or less, or raise train.steps"
        )
    decay = decay_steps(schedule, total_steps)
    if schedule.name == "wsd" and schedule.warmup + decay > total_steps:
        raise ValueError(
            f"schedule.warmup ({schedule.warmup}) + schedule.decay ({decay}) is more than train.steps = "
            f"{total_steps}: lower one of the two, or raise train.steps"
        )


def learning_rate(schedule: ScheduleConfig, step: int, total_steps: int, peak: float) -> float:
    """Learning rate of the update that takes the run from `step` steps done to `step + 1`.

    Steps count from 0. Warmup climbs by peak / warmup a step and never wastes an update on a rate of 0; the
    decay starts at the peak and would reach `min_ratio * peak` at `step = total_steps`, where it stays.

    Sources: cosine, Loshchilov & Hutter 2017 (arXiv:1608.03983); wsd, Hu et al. 2024 (arXiv:2404.06395);
    its sqrt decay, Hägele et al. 2024 (arXiv:2405.18392).
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return peak
    start = total_steps - decay_steps(schedule, total_steps) if schedule.name == "wsd" else schedule.warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if schedule.name == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.name == "wsd" and schedule.decay_shape == "sqrt":
        height = 1 - math.sqrt(progress)
    else:
        height = 1 - progress
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * height)

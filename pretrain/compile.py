"""When torch.compile pays."""

import shutil
from typing import Literal

import torch

COMPILE_SECONDS = 30.0  # a cold compile of blocks and loss: 10 to 30 s on 2 cores, measured
EAGER_FLOPS = {"cpu": 2e11, "cuda": 2e14}  # model FLOPs a second and process before compiling, roughly


def decide_compile(setting: Literal["auto", "on", "off"], flops_left: float, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason for the log. `flops_left`: model FLOPs this process still has to do.

    auto: on when a compiler exists and eager training would take over 4 times as long as compiling. Raises
    ValueError for "on" without a compiler.
    """
    compiler = has_compiler(device)
    if setting == "on" and not compiler:
        raise ValueError('train.compile = "on", but no compiler was found (g++ or clang, triton on a GPU); install one')
    if setting != "auto":
        return setting == "on", f"train.compile = {setting}"
    if not compiler:
        return False, "no compiler found (g++ or clang on CPU, triton on a GPU)"
    eager_seconds = flops_left / EAGER_FLOPS.get(device.type, 2e11)
    if eager_seconds < 4 * COMPILE_SECONDS:
        return False, f"about {eager_seconds:.0f} s of training are too short to win back compiling"
    return True, "the run is long enough"


def has_compiler(device: torch.device) -> bool:
    """Whether inductor's back end for this device is there."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))

"""The part of a checkpoint that is no tensor of the model; random-number state as JSON, for it."""

import base64
import json
from pathlib import Path
from typing import Any

import torch

from checkpoints.manifest import STATE


def rng_state() -> dict[str, str]:
    """This process's torch generators: {"cpu": base64, "cuda": base64 where there is a device}."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(state.numpy())).decode() for name, state in states.items()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave; a generator that this machine lacks is left out."""
    tensors = {k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.uint8) for k, v in state.items()}
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says, all of it."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
    return state

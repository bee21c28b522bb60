"""Random-number state as JSON, for the part of a checkpoint that is no tensor of the model."""

import base64
from typing import Any

import torch


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

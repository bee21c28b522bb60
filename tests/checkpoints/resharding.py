"""Real engines whose state has known values, saved and loaded under any layout."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.engine import Engine
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.objectives import OBJECTIVES
from pretrain.train import build_engine

Parts = dict[str, dict[str, Tensor]]  # "model", "optimizer" -> name -> tensor


def start(config: RunConfig) -> Engine:
    """The engine of a config on the ranks there are."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return build_engine(config, world, OBJECTIVES[config.objective.name][1](config.objective))


def known_values(part: str, name: str, like: Tensor) -> Tensor:
    """A whole tensor of the shape and type of `like`, whose elements follow from its name and their place alone.

    All are multiples of 1/512 below 8, so that fp32 holds them exactly. Single numbers count steps.
    """
    if not like.ndim:
        return torch.full_like(like, 3)
    numbers = torch.arange(like.numel(), dtype=torch.int64) * 7919 + zlib.crc32(f"{part} {name}".encode())
    return ((numbers % 4093) / 512).to(like.dtype).reshape(like.shape)


def tensors(parts: Parts) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all."""
    for part, named in parts.items():
        for name, tensor in named.items():
            yield part, name, tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parts: Parts) -> None:
    """Give every tensor its known values."""
    for part, name, tensor in tensors(parts):
        whole = known_values(part, name, tensor)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        local(tensor).copy_(whole)


@torch.no_grad()
def wrong(parts: Parts) -> list[str]:
    """Collective. Tensors that are not bit for bit their known values once they are gathered."""
    found = []
    for part, name, tensor in tensors(parts):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(whole, known_values(part, name, tensor)):
            found.append(f"{part} {name}")
    return found


def shape_of(parts: Parts) -> dict[str, Any]:
    """Shape of every whole tensor."""
    return {f"{part} {name}": list(tensor.shape) for part, name, tensor in tensors(parts)}

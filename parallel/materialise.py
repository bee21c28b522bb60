"""From the meta device to real parameters, with initial values that do not depend on the layout."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def materialise(model: Any, device: torch.device) -> None:
    """Allocate the parameters of `model` (built on meta, perhaps sharded) on `device`; values are undefined."""
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gave each name storage of its own


@torch.no_grad()
def init_parameters(model: Any, seed: int, tied: Mapping[str, str]) -> None:
    """Fill every parameter and buffer with a function of (seed, its name): all layouts start equal.

    One full matrix at a time is drawn on the CPU, and each rank keeps its part; of a stack (experts) it draws those
    that it holds. tied: name -> name of the parameter, perhaps of another pipeline stage, whose values it gets.
    """
    for own_name, parameter in (*model.named_parameters(), *model.named_buffers()):
        name = tied.get(own_name, own_name)
        for number, part, placements in _matrices(parameter):
            # fp32 values, whatever precision they are then kept in
            full = torch.empty(parameter.shape if number is None else parameter.shape[1:])
            own = name if number is None else f"{name}.{number}"
            model.init_parameter(name, full, generator_for(seed, own))
            if isinstance(parameter, DTensor):
                full = full.to(parameter.device)
                full = distribute_tensor(full, parameter.device_mesh, placements, src_data_rank=None).to_local()
            part.copy_(full)


def _matrices(parameter: Tensor) -> Iterator[tuple[int | None, Tensor, list[Placement]]]:
    """What this process holds of a parameter, and how it is placed: all, or of a stack each matrix, with its number."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    placements = list(parameter.placements) if isinstance(parameter, DTensor) else []
    if parameter.ndim < 3:
        yield None, local, placements
        return
    numbers = torch.arange(len(parameter))
    if isinstance(parameter, DTensor):
        dims = [getattr(place, "dim", None) for place in placements]
        of_stack = [place if dim == 0 else Replicate() for place, dim in zip(placements, dims, strict=True)]
        numbers = numbers.to(parameter.device)
        numbers = distribute_tensor(numbers, parameter.device_mesh, of_stack, src_data_rank=None).to_local()
        placements = [Shard(dim - 1) if dim else Replicate() for dim in dims]
    for number, matrix in zip(numbers.tolist(), local, strict=True):
        yield number, matrix, placements


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that is a function of (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class Named(NamedTuple):
    """tensors: parameters by name, each storage once. copies: tied name -> parameter of the last pipeline stage that
    has the values of one of the first stage; it stands among `tensors` where the first stage is on another process.
    """

    tensors: dict[str, Tensor]
    copies: dict[str, Tensor]


def name_stages(models: Iterable[nn.Module], tied: Mapping[str, str]) -> Named:
    """Parameters of the pipeline stages of a process; `tied` as the plan states it."""
    named = Named({}, {})
    for model in models:
        for name, parameter in named_tensors(model)[0].items():
            (named.copies if name in tied else named.tensors)[name] = parameter
    for name, parameter in named.copies.items():
        named.tensors.setdefault(tied[name], parameter)
    return named


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by name, each storage once, and the ties: other name -> the name it is stored under."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first_name: dict[int, str] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, parameter in everything:
        if id(parameter) in first_name:
            ties[name] = first_name[id(parameter)]
        else:
            first_name[id(parameter)] = name
            tensors[name] = parameter
    return tensors, ties

"""Gradients over all processes: placed as their parameters, their norm, clipping."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def settle(parameters: Iterable[Tensor]) -> None:
    """Give every gradient the placements of its parameter: sums that tensor parallelism has left partial are done."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def total_norm(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """2-norm of all gradients as one vector, an fp64 scalar, each element once however many processes hold it.

    One number crosses the processes. `parameters`: those of this process, a parameter that another pipeline stage
    counts left out.
    """
    own = [local(p.grad) for p in parameters if p.grad is not None and _first_holder(p.grad)]
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if own:
        squares += torch.stack(torch._foreach_norm(own)).double().square().sum().to(device)
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def clip(parameters: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, now `norm`, is at most `largest`."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be distributed; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_holder(grad: Tensor) -> bool:
    """Whether this process is the first of those that hold the same elements."""
    if not isinstance(grad, DTensor):
        return True
    coordinate = grad.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(index == 0 or not place.is_replicate() for place, index in zip(grad.placements, coordinate, strict=True))

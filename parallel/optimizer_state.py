"""An optimizer's state as flat named tensors, and its learning rate; for any `torch.optim.Optimizer`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

NamedParameters = Iterable[tuple[str, Tensor]]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times the group's own `lr_ratio` (1 when it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def start_average(optimizer: Optimizer, named_parameters: NamedParameters) -> None:
    """Begin a moving average of the optimised parameters, at what they are now. It is state like any other: "ema"."""
    for parameter in _names(optimizer, named_parameters):
        optimizer.state[parameter]["ema"] = parameter.detach().clone()


@torch.no_grad()
def update_average(optimizer: Optimizer, decay: float) -> None:
    """The average becomes decay * average + (1 - decay) * parameter. Each process has its own parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = [_local(optimizer.state[p]["ema"]) for p in parameters]
    torch._foreach_lerp_(averages, [_local(p.detach()) for p in parameters], 1 - decay)


def optimizer_state(optimizer: Optimizer, named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The live state tensors as `{"exp_avg.<parameter name>": tensor, "step.<parameter name>": ...}`.

    Tensors are the optimizer's own (DTensors where the parameters are), so writing into them loads. State
    that the optimizer would make only at its first step is made here; parameters, gradients stay.
    Raises ValueError when a parameter of the optimizer has no name.
    """
    names = _names(optimizer, named_parameters)
    initialise(optimizer)
    return {
        f"{key}.{name}": value
        for parameter, name in names.items()
        for key, value in sorted(optimizer.state[parameter].items())
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    optimizer: Optimizer, named_parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Copy `tensors`, as `optimizer_state` names them, into the optimizer: in place, bit for bit.

    A DTensor takes a DTensor of the same placements, or the whole tensor, of which it keeps its part.
    Raises ValueError when a name is missing or unknown, or a shape or dtype differs.
    """
    targets = optimizer_state(optimizer, named_parameters)
    missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(
            f"optimizer state does not fit: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} "
            f"unknown {unknown[:3]}: resume with the optim.name and the model that wrote the checkpoint"
        )
    for name, target in targets.items():
        source = tensors[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"optimizer state {name!r} is {list(source.shape)} {source.dtype}, expected "
                f"{list(target.shape)} {target.dtype}: resume with the model that wrote the checkpoint"
            )
    with torch.no_grad():
        for name, target in targets.items():
            _copy(target, tensors[name])


def _names(optimizer: Optimizer, named_parameters: NamedParameters) -> dict[Tensor, str]:
    """Optimised parameter -> name, in the optimizer's order; a tied parameter keeps its first name."""
    given: dict[Tensor, str] = {}
    for name, parameter in named_parameters:
        given.setdefault(parameter, name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = [list(parameter.shape) for parameter in parameters if parameter not in given]
    if unnamed:
        raise ValueError(
            f"{len(unnamed)} of the optimizer's parameters have no name, the first of shape {unnamed[0]}: "
            f"pass the named_parameters() of the model that the optimizer was built for"
        )
    return {parameter: given[parameter] for parameter in parameters}


def initialise(optimizer: Optimizer) -> None:
    """Make lazily created state: step with zero gradients, learning rate and decay; then zero the new state.

    Right for every optimizer whose fresh state is all zeros (SGD, Adam, AdamW, Muon).
    """
    groups = optimizer.param_groups
    new = [p for group in groups for p in group["params"] if not optimizer.state.get(p)]
    if not new:
        return
    everything = [p for group in groups for p in group["params"]]
    gradients = [p.grad for p in everything]
    settings = [(group["lr"], group.get("weight_decay", 0.0)) for group in groups]
    for p in everything:
        p.grad = None
    for p in new:
        p.grad = torch.zeros_like(p)
    for group in groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    optimizer.step()
    for p in new:
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor):
                value.zero_()
    for p, gradient in zip(everything, gradients, strict=True):
        p.grad = gradient
    for group, (lr, weight_decay) in zip(groups, settings, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy(target: Tensor, source: Tensor) -> None:
    placements = getattr(target, "placements", None)
    if placements is not None and not hasattr(source, "placements"):
        whole = type(target).from_local(source.to(target.device), target.device_mesh)  # type: ignore[attr-defined]
        source = whole.redistribute(placements=placements)
    target.copy_(source)

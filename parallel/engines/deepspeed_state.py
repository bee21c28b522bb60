"""What a DeepSpeed engine holds, by the names of the native model: out of ZeRO's flat partitions, and back into them.

ZeRO strings the parameters of a group together and cuts the string where it likes. Here each process gets its rows of
each tensor, as a DTensor in host memory: one tensor at a time is whole on a process.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from parallel.optimizer_state import initialise, optimizer_state

Tensors = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class State(Protocol):
    """Every method is collective."""

    def read(self) -> dict[str, Tensors]:
        """As `Engine.state_dict`."""

    def write(self, state: dict[str, Tensors]) -> None:
        """As `Engine.load_state_dict`, with what `read` gave."""

    def gradients(self) -> Tensors:
        """Whole ones."""

    def clip(self, largest: float) -> Tensor:
        """Norm of all gradients; has them scaled down to the largest norm allowed, 0 for any, by the next update."""

    def cap(self, name: str, largest: float) -> None:
        """Cut the values of a parameter down to `largest`."""

    def stepped(self) -> None:
        """The update is done."""


class WholeState:
    """ZeRO 0: every process has everything."""

    def __init__(self, optimizer: Optimizer, named: Tensors):
        self._optimizer, self._named = optimizer, named

    def read(self) -> dict[str, Tensors]:
        tensors = {name: tensor.detach() for name, tensor in self._named.items()}
        return {"model": tensors, "optimizer": optimizer_state(self._optimizer, self._named.items())}

    def write(self, state: dict[str, Tensors]) -> None:
        """Reading has filled the live tensors."""

    def gradients(self) -> Tensors:
        return {name: tensor.grad for name, tensor in self._named.items() if tensor.grad is not None}

    def clip(self, largest: float) -> Tensor:
        gradients = list(self.gradients().values())
        norm = torch.stack(torch._foreach_norm(gradients)).double().square().sum().sqrt()
        if largest:
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def cap(self, name: str, largest: float) -> None:
        self._named[name].clamp_(max=largest)

    def stepped(self) -> None:
        pass


class CutState:
    """ZeRO 1 to 3.

    stage: of ZeRO; zero: DeepSpeed's optimizer around `optimizer`; groups: parameter name -> index of its group there;
    mesh: of the data processes, on the host; None for one process.
    """

    def __init__(
        self,
        stage: int,
        zero: Any,
        optimizer: Optimizer,
        named: Tensors,
        groups: Mapping[str, int],
        mesh: DeviceMesh | None,
    ):
        self._cut = stage == 3  # parameters too
        self._zero, self._optimizer, self._named, self._groups, self._mesh = zero, optimizer, named, groups, mesh
        self._start()

    def read(self) -> dict[str, Tensors]:
        model: Tensors = {}
        optimizer: Tensors = {}
        for name, parameter in self._named.items():
            if not self._is_cut(parameter):
                model[name] = parameter.detach()
                continue
            with GatheredParameters(parameter):
                model[name] = self._own_rows(parameter.detach())
        for name, group in self._groups.items():
            for key in MOMENTS:
                optimizer[f"{key}.{name}"] = self._own_rows(safe_get_full_optimizer_state(self._named[name], key))
            optimizer[f"step.{name}"] = self._steps(group)[0].clone()
        return {"model": model, "optimizer": optimizer}

    def write(self, state: dict[str, Tensors]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        steps: dict[int, set[float]] = {}
        for name, group in self._groups.items():
            steps.setdefault(group, set()).add(float(optimizer[f"step.{name}"]))
        if any(len(found) > 1 for found in steps.values()):
            raise ValueError(
                "the checkpoint's parameters have not all taken the same number of optimizer steps, but ZeRO counts "
                'one number for many; set deepspeed.zero = 0, or take engine = "torch"'
            )
        for name, parameter in self._named.items():
            self._put(name, _whole(model[name], parameter.device))
        for name, group in self._groups.items():
            parameter = self._named[name]
            for key in MOMENTS:
                value = _whole(optimizer[f"{key}.{name}"], parameter.device)
                if self._cut:
                    safe_set_local_optimizer_state(parameter, _partition(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
            for step in self._steps(group):
                step.copy_(optimizer[f"step.{name}"])

    def gradients(self) -> Tensors:
        of = self._zero.get_fp32_grad_for_param if self._cut else _full_gradient
        return {name: of(self._named[name]) for name in self._groups}

    def clip(self, largest: float) -> Tensor:
        """DeepSpeed clips in its update, to the norm that it was configured with: `largest`."""
        if self._cut:
            groups = self._zero._get_norm_groups()
            self._zero._get_norm_groups = lambda: groups  # the update need not take it again
            return combine_grad_norm_groups(groups)
        norm: Tensor = self._zero.scaled_global_norm()
        self._zero.scaled_global_norm = lambda: norm
        return norm

    def cap(self, name: str, largest: float) -> None:
        parameter = self._named[name]
        with GatheredParameters(parameter, enabled=self._cut):
            value = parameter.detach().clamp(max=largest)
        self._put(name, value)

    def stepped(self) -> None:
        """Norms are those of other gradients from here on."""
        for name in ("_get_norm_groups", "scaled_global_norm"):
            self._zero.__dict__.pop(name, None)

    def _start(self) -> None:
        """Make the moments: DeepSpeed would do so in the first update."""
        if not self._cut:
            initialise(self._optimizer)
            self._zero._lazy_init_hp_params_optimizer_state()
            return
        for number, piece in enumerate(self._zero.fp32_partitioned_groups_flat):
            on_disk = self._zero._swappable_optimizer_subgroup(number)
            if on_disk:
                self._zero._optimizer_states_and_gradient_swap_in(number)
            group = self._optimizer.param_groups[self._zero.sub_group_to_group_id[number]]
            group["params"] = [piece]
            initialise(self._optimizer)
            group["params"] = []
            if on_disk:
                self._zero._optimizer_states_and_gradient_swap_out(number)

    def _put(self, name: str, value: Tensor) -> None:
        """Give a parameter its values, and ZeRO's copy of them too. value: whole."""
        parameter = self._named[name]
        with GatheredParameters(parameter, modifier_rank=0, enabled=self._cut):
            parameter.data.copy_(value)
        if name in self._groups and self._cut:
            safe_set_local_fp32_param(parameter, _partition(parameter, value))
        elif name in self._groups:
            safe_set_full_fp32_param(parameter, value)

    def _is_cut(self, tensor: Tensor) -> bool:
        return self._cut and hasattr(tensor, "ds_tensor")

    def _steps(self, group: int) -> list[Tensor]:
        """The counter of optimizer steps of each piece of a group's string."""
        zero = self._zero
        if self._cut:
            flat = [
                p for n, p in enumerate(zero.fp32_partitioned_groups_flat) if zero.sub_group_to_group_id[n] == group
            ]
        else:
            flat = [zero.single_partition_of_fp32_groups[group]]
        return [self._optimizer.state[piece]["step"] for piece in flat]

    def _own_rows(self, whole: Tensor) -> Tensor:
        """A copy in host memory of this process's rows; all of what has no rows."""
        if self._mesh is None or not whole.ndim:
            return whole.to("cpu", copy=True)
        rows = whole.tensor_split(1) if not whole.numel() else whole.chunk(self._mesh.size())
        rank = self._mesh.get_local_rank()
        own = rows[rank] if rank < len(rows) else whole[:0]
        local = own.to("cpu", copy=True)
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )


def _whole(tensor: Tensor, device: torch.device) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(device)


def _partition(parameter: Any, whole: Tensor) -> Tensor:
    """This process's part of a tensor as ZeRO 3 cuts it: flat, filled up with zeros."""
    size = parameter.ds_tensor.ds_numel
    own = whole.flatten()[size * parameter.ds_process_group.rank() :][:size]
    return torch.cat([own, own.new_zeros(size - own.numel())])


def _full_gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.get_full_hp_grad()
    return gradient

"""AdamW over Megatron's gradient buffers: whole on every data rank, or cut over them by its distributed optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor

from parallel.engine import EngineSpec
from parallel.engines.megatron_weights import Entry, Places
from parallel.optimizer_state import initialise, set_lr

STEP = "step"  # the one state of a parameter that has not its shape


class WholeOptimizer:
    """Every data rank has all moments. models: Megatron's DistributedDataParallel of each chunk. copies: entries of
    tensors that another pipeline stage has too.
    """

    shared = False  # whether data ranks share what a tensor's state is

    def __init__(self, spec: EngineSpec, models: list[Any], entries: list[Entry], copies: list[Entry], places: Places):
        self._models, self._places, self._tied, self._copies = models, places, spec.plan.tied, copies
        self.entries = [entry for entry in entries if all(tensor.requires_grad for tensor in entry.tensors)]
        self.device = self.entries[0].tensors[0].device
        self._start(spec.make_optimizer)

    def whole_gradient(self, tensor: Tensor) -> Tensor:
        """As large as the tensor."""
        gradient: Tensor = tensor.main_grad  # type: ignore[attr-defined]
        return gradient

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """Norm of all gradients as one vector, each element once; they are scaled down to `largest`, 0: never."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for entry in self.entries:
            if self._first_holder(entry):
                squares += sum(self._own_gradient(tensor).double().square().sum() for tensor in entry.tensors)
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if largest:
            factor = (largest / (norm + 1e-6)).clamp(max=1.0)
            for model in self._models:
                model.scale_gradients(factor)
        return norm

    def step(self, lr: float) -> None:
        set_lr(self._optimizer, lr)
        for entry in self.entries:
            for tensor in entry.tensors:
                tensor.grad = self.whole_gradient(tensor)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_of(self, entry: Entry) -> dict[str, Tensor]:
        """ "exp_avg.<ours>" and so on, "step.<ours>". Collective."""
        found: dict[str, Tensor] = {}
        for key in self.keys:
            parts = entry.split(partial(self._whole, entry, key))
            for name, part in parts.items():
                found[f"{key}.{self._name(name)}"] = self._places.wrap(entry, name, part, self.shared)
        return found | {f"{STEP}.{self._name(name)}": self._count(entry) for name in entry.ours}

    @torch.no_grad()
    def load(self, entry: Entry, state: dict[str, Tensor]) -> None:
        """The reverse of `state_of`. Collective."""
        for key in self.keys:
            parts = {name: self._places.part(state[f"{key}.{self._name(name)}"]) for name in entry.ours}
            values = {id(tensor): torch.empty_like(tensor) for tensor in entry.tensors}
            entry.fill(lambda tensor, values=values: values[id(tensor)], parts)  # type: ignore[misc]
            for tensor in entry.tensors:
                self._set(key, tensor, values[id(tensor)])
        for tensor in entry.tensors:
            self._set(STEP, tensor, state[f"{STEP}.{self._name(next(iter(entry.ours)))}"])

    keys = ("exp_avg", "exp_avg_sq")

    def _start(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        self._optimizer = make(_named(self.entries))
        initialise(self._optimizer)

    def _own_gradient(self, tensor: Tensor) -> Tensor:
        """What this data rank has of it alone; all of it where every one has all."""
        return self.whole_gradient(tensor)

    def _whole(self, entry: Entry, key: str, tensor: Tensor) -> Tensor:
        found: Tensor = self._optimizer.state[tensor][key]
        return found

    def _set(self, key: str, tensor: Tensor, value: Tensor) -> None:
        self._optimizer.state[tensor][key].copy_(value)

    def _count(self, entry: Entry) -> Tensor:
        step: Tensor = self._optimizer.state[entry.tensors[0]][STEP]
        return step.clone()

    def _first_holder(self, entry: Entry) -> bool:
        """Whether this process is the first of those that have these gradients."""
        if entry in self._copies:
            return False
        first = self.shared or _data_group(entry).rank() == 0
        return first and (entry.cut or parallel_state.get_tensor_model_parallel_rank() == 0)

    def _name(self, name: str) -> str:
        return self._tied.get(name, name)


class SharedOptimizer(WholeOptimizer):
    """Megatron's distributed optimizer: each data rank has the moments of one stretch of each gradient buffer, wherever
    in a tensor that begins and ends. What is saved is cut along a dim instead: one tensor at a time is made whole.
    """

    shared = True

    def step(self, lr: float) -> None:
        for optimizer in self._parts:
            set_lr(optimizer.optimizer, lr)
            optimizer.prepare_grads()
        for optimizer in self._parts:
            optimizer.step_with_ready_grads()
            optimizer.zero_grad()
        self._steps += 1

    def whole_gradient(self, tensor: Tensor) -> Tensor:
        whole = torch.zeros_like(tensor)
        own = self._range(tensor)
        if own is not None:
            whole.view(-1)[own] = tensor.main_grad.view(-1)[own]  # type: ignore[attr-defined]
        dist.all_reduce(whole, group=self._groups[id(tensor)])
        return whole

    def _start(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        self._groups = {id(tensor): _data_group(entry) for entry in self.entries for tensor in entry.tensors}
        self._steps = 0
        self._parts: list[DistributedOptimizer] = []
        self._part: dict[int, DistributedOptimizer] = {}
        for apart in (False, True):
            entries = [entry for entry in self.entries if _apart(entry) == apart]
            if not entries:
                continue
            buffers = [m.expert_parallel_buffers if apart else m.buffers for m in self._models]
            optimizer = DistributedOptimizer(
                make(_named(entries)),
                OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, params_dtype=torch.float32),
                None,
                None,
                self._models,
                dict(enumerate(buffers)),
                _data_group(entries[0]),
                None,
                0,
                0,
            )
            initialise(optimizer.optimizer)
            self._parts.append(optimizer)
            self._part |= {id(tensor): optimizer for entry in entries for tensor in entry.tensors}

    def _own_gradient(self, tensor: Tensor) -> Tensor:
        own = self._range(tensor)
        flat: Tensor = tensor.main_grad.view(-1)  # type: ignore[attr-defined]
        return flat[own] if own is not None else flat[:0]

    def _range(self, tensor: Tensor) -> slice | None:
        """Elements of the flat tensor that are this data rank's."""
        part = self._part[id(tensor)]
        if tensor not in part.model_param_group_index_map:
            return None
        found = part._get_model_param_range_map(tensor)["param"]
        return slice(found.start, found.end)

    def _state(self, tensor: Tensor) -> dict[str, Tensor]:
        part = self._part[id(tensor)]
        group, order = part.model_param_group_index_map[tensor]
        found: dict[str, Tensor] = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        return found

    def _whole(self, entry: Entry, key: str, tensor: Tensor) -> Tensor:
        whole = torch.zeros_like(tensor)
        own = self._range(tensor)
        if own is not None:
            whole.view(-1)[own] = self._state(tensor)[key]
        dist.all_reduce(whole, group=_data_group(entry))
        return whole

    def _set(self, key: str, tensor: Tensor, value: Tensor) -> None:
        own = self._range(tensor)
        if key == STEP:
            self._steps = int(value)
        if own is not None:
            self._state(tensor)[key].copy_(value if key == STEP else value.view(-1)[own])

    def _count(self, entry: Entry) -> Tensor:
        return torch.tensor(float(self._steps))


def _named(entries: list[Entry]) -> list[tuple[str, Any]]:
    return [(next(iter(entry.ours)), tensor) for entry in entries for tensor in entry.tensors]


def _data_group(entry: Entry) -> Any:
    """The processes that have the same of it."""
    if _apart(entry):
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _apart(entry: Entry) -> bool:
    """Whether it has gradient buffers of another kind: those of experts that processes share."""
    return not getattr(entry.tensors[0], "allreduce", True)

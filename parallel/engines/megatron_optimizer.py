"""AdamW over Megatron's gradient buffers: whole on every data rank, or cut over them by its distributed optimizer."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from parallel.engine import EngineSpec
from parallel.engines.megatron_weights import Entry, Places
from parallel.optimizer_state import initialise, set_lr

STEP = "step"


class MegatronOptimizer:
    """The optimizer's part of the engine. copies: entries of tensors that another pipeline stage has too."""

    def __init__(
        self,
        spec: EngineSpec,
        models: list[Any],
        entries: list[Entry],
        copies: list[Entry],
        places: Places,
        degrees: dict[str, int],
    ):
        self._models, self._places, self._tied = models, places, spec.plan.tied
        self.entries = [entry for entry in entries if all(tensor.requires_grad for tensor in entry.tensors)]
        self._copies = copies
        named = [(next(iter(entry.ours)), tensor) for entry in self.entries for tensor in entry.tensors]
        self._optimizer = spec.make_optimizer(named)  # type: ignore[arg-type]
        initialise(self._optimizer)

    def whole_gradient(self, tensor: Tensor) -> Tensor:
        gradient: Tensor = tensor.main_grad  # type: ignore[attr-defined]
        return gradient

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """Norm of all gradients as one vector, each element once; they are scaled down to `largest`, 0: never."""
        squares = torch.zeros((), dtype=torch.float64)
        for entry in self.entries:
            if self._counts(entry):
                squares += sum(self.whole_gradient(t).double().square().sum().cpu() for t in entry.tensors)
        squares = squares.to(self.whole_gradient(self.entries[0].tensors[0]).device)
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if largest:
            factor = (largest / (norm + 1e-6)).clamp(max=1.0)
            for model in self._models:
                model.scale_gradients(float(factor))
        return norm

    def step(self, lr: float) -> None:
        set_lr(self._optimizer, lr)
        for entry in self.entries:
            for tensor in entry.tensors:
                tensor.grad = self.whole_gradient(tensor)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_of(self, entry: Entry) -> dict[str, Tensor]:
        """ "exp_avg.<ours>" and so on, as parts of the whole where they are; "step.<ours>" as it is."""
        found: dict[str, Tensor] = {}
        for key in self._optimizer.state[entry.tensors[0]]:
            if key == STEP:
                step = self._optimizer.state[entry.tensors[0]][STEP]
                found |= {f"{STEP}.{self._name(name)}": step.clone() for name in entry.ours}
            else:
                parts = entry.split(partial(self._state, key))
                found |= {
                    f"{key}.{self._name(name)}": self._places.wrap(entry, name, part) for name, part in parts.items()
                }
        return found

    @torch.no_grad()
    def load(self, entry: Entry, state: dict[str, Tensor]) -> None:
        """The reverse of `state_of`."""
        for key in self._optimizer.state[entry.tensors[0]]:
            names = {name: f"{key}.{self._name(name)}" for name in entry.ours}
            if key == STEP:
                for tensor in entry.tensors:
                    self._optimizer.state[tensor][STEP].copy_(state[next(iter(names.values()))])
            else:
                parts = {name: _local(state[saved]) for name, saved in names.items()}
                entry.fill(partial(self._state, key), parts)

    def _state(self, key: str, tensor: Tensor) -> Tensor:
        found: Tensor = self._optimizer.state[tensor][key]
        return found

    def _counts(self, entry: Entry) -> bool:
        """Whether this process is the first of those that have these gradients."""
        if entry in self._copies:
            return False
        of_experts = entry.stacked
        replica = (
            parallel_state.get_expert_data_parallel_rank()
            if of_experts
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        return replica == 0 and (entry.cut or parallel_state.get_tensor_model_parallel_rank() == 0)

    def _name(self, name: str) -> str:
        return self._tied.get(name, name)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

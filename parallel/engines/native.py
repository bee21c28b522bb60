"""The torch-native engine: FSDP2 over a device mesh, autocast, torch optimizers."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.engine import Batch, EngineSpec, Sums
from parallel.fsdp import reduce_over_replicas
from parallel.materialise import named_tensors
from parallel.mesh import build_mesh, resolve_degrees
from parallel.optimizer_state import optimizer_state, set_lr
from parallel.parallelize import parallelize
from parallel.world import World


class NativeEngine:
    """See `parallel.engine.Engine`."""

    def __init__(self, spec: EngineSpec, world: World):
        degrees = resolve_degrees(spec.parallel, world.size)
        self.mesh = build_mesh(degrees, world.device.type) if world.size > 1 else None
        self.device = world.device
        self.data_rank, self.data_world = world.rank, world.size
        self.precision = spec.precision
        self.max_norm = spec.clip_grad_norm
        self.root = parallelize(spec, self.mesh, world.device)
        self.model = self.root.model
        self.optimizer = spec.make_optimizer(self.model.named_parameters())
        self._tensors, self._ties = named_tensors(self.model)

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        totals: Sums = {}
        for index, batch in enumerate(microbatches):
            reduce_over_replicas(self.root, index == len(microbatches) - 1)
            with self._autocast():
                sums = self.root(self._to_device(batch))
            (sums["loss"] / count).backward()
            _add(totals, sums)
        return {name: value / count for name, value in self._reduce(totals).items()}

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        totals: Sums = {}
        for batch in microbatches:
            with self._autocast():
                _add(totals, self.root(self._to_device(batch)))
        return self._reduce(totals)

    def clip_grad_norm(self) -> Tensor:
        parameters = [p for p in self._tensors.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm, foreach=True)
        return norm

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum_over_data(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}
        return {"model": tensors, "optimizer": optimizer_state(self.optimizer, self._tensors.items())}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Nothing to do: `state_dict()` gave the live tensors, and reading filled them."""

    @property
    def ties(self) -> dict[str, str]:
        return self._ties

    def close(self) -> None:
        self.optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _reduce(self, sums: Sums) -> Sums:
        if not sums:
            raise ValueError("no micro-batch was given: the data has fewer samples than one micro-batch needs")
        stacked = self.sum_over_data(torch.stack(list(sums.values())))
        return dict(zip(sums, stacked.unbind(), strict=True))


def _add(totals: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()

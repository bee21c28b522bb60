"""The torch-native engine: all strategies over one mesh, autocast, torch optimizers."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import check_context, split_sequence
from parallel.engine import Batch, EngineSpec, Sums
from parallel.fsdp import reduce_over_replicas
from parallel.gradients import clip, settle, total_norm
from parallel.materialise import named_tensors
from parallel.mesh import Mesh, resolve_degrees
from parallel.optimizer_state import optimizer_state, set_lr
from parallel.parallelize import parallelize
from parallel.tensor import check_tensor
from parallel.world import World


class NativeEngine:
    """See `parallel.engine.Engine`."""

    def __init__(self, spec: EngineSpec, world: World):
        degrees = resolve_degrees(spec.parallel, world.size)
        cp, tp = degrees["cp"], degrees["tp"]
        check_tensor(spec.plan, tp, spec.seq_len // cp)
        check_context(spec.seq_len, cp, spec.parallel.cp_method, spec.plan.heads, tp)
        self.mesh = Mesh(degrees, world.device.type) if world.size > 1 else None
        self.device = world.device
        self.data_world = degrees["dp_replicate"] * degrees["dp_shard"]
        self.copies = world.size // self.data_world  # processes that read the same data
        self.data_rank = world.rank // (cp * tp) % self.data_world
        self._split = partial(split_sequence, dim=1, rank=world.rank // tp % cp, cp=cp, method=spec.parallel.cp_method)
        self._cut = spec.sequence if cp > 1 else ()
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
        settle(self._tensors.values())
        return {name: value / count for name, value in self._reduce(totals).items()}

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        totals: Sums = {}
        for batch in microbatches:
            with self._autocast():
                _add(totals, self.root(self._to_device(batch)))
        return self._reduce(totals)

    def clip_grad_norm(self) -> Tensor:
        norm = total_norm(self._tensors.values(), self.device)
        if self.max_norm:
            clip(self._tensors.values(), self.max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum_over_data(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        if self.mesh is None:
            return values
        dist.all_reduce(values)
        return -(-values // self.copies)

    def gradients(self) -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in self._tensors.items() if tensor.grad is not None}

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
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _to_device(self, batch: Batch) -> Batch:
        """The batch on this device: whole, but for what context parallelism cuts."""
        mine = {name: self._split(value) if name in self._cut else value for name, value in batch.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in mine.items()}

    def _reduce(self, sums: Sums) -> Sums:
        """Over all processes, each token once."""
        if not sums:
            raise ValueError("no micro-batch was given: the data has fewer samples than one micro-batch needs")
        stacked = torch.stack(list(sums.values()))
        if self.mesh is not None:
            if self.mesh["tp"].get_local_rank():
                stacked = torch.zeros_like(stacked)
            dist.all_reduce(stacked)
        return dict(zip(sums, stacked.unbind(), strict=True))


def _add(totals: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()

"""The torch-native engine: all strategies over one mesh, autocast, torch optimizers."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from parallel.across import check_across, over_data
from parallel.context import check_context, split_sequence
from parallel.engine import Batch, EngineSpec, Sums
from parallel.expert import Routers, check_experts
from parallel.fsdp import reduce_over_replicas
from parallel.gradients import clip, settle, total_norm
from parallel.materialise import name_stages
from parallel.mesh import Mesh, resolve_degrees
from parallel.optimizer_state import initialise, optimizer_state, set_lr, start_average, update_average
from parallel.parallelize import modules_on_meta, parallelize
from parallel.pipeline import Pipeline
from parallel.tensor import check_tensor
from parallel.world import World


class NativeEngine:
    """See `parallel.engine.Engine`."""

    def __init__(self, spec: EngineSpec, world: World):
        degrees = resolve_degrees(spec.parallel, world.size)
        cp, tp = degrees["cp"], degrees["tp"]
        check_tensor(spec.plan, tp, spec.seq_len // cp)
        check_experts(spec.plan, degrees["ep"])
        check_context(spec.seq_len, cp, spec.parallel.cp_method, spec.plan.heads, tp)
        if spec.across is not None:
            check_across(degrees, spec.global_batch, spec.micro_batch)
        self.mesh = Mesh(degrees, world.device.type) if world.size > 1 else None
        if spec.across is not None:
            spec.across(over_data(self.mesh))
        self.device = world.device
        self.data_world = degrees["dp_replicate"] * degrees["dp_shard"]
        self.copies = world.size // self.data_world  # processes that read the same data
        self.data_rank = world.rank // (cp * tp) % self.data_world
        self._split = partial(split_sequence, dim=1, rank=world.rank // tp % cp, cp=cp, method=spec.parallel.cp_method)
        self._cut = spec.sequence if cp > 1 else ()
        self.precision = spec.precision
        self.max_norm = spec.clip_grad_norm
        self.stages = parallelize(spec, self.mesh, world.device)
        self.pipeline = self._make_pipeline(spec) if degrees["pp"] > 1 else None
        self._tied, self._largest = spec.plan.tied, spec.plan.largest
        self._named = name_stages((stage.model for stage in self.stages.values()), spec.plan.tied)
        self.optimizer = spec.make_optimizer(self._parameters())
        self._ema = spec.ema
        if self._ema:
            initialise(self.optimizer)
            start_average(self.optimizer, self._parameters())
        models = [stage.model for stage in self.stages.values()]
        self._routers = Routers(modules_on_meta(spec, spec.plan.routing), models, spec.plan.experts, world.device)

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        self._routers.begin(1 / count)
        if self.pipeline is None:
            totals = self._accumulate(microbatches, count)
        else:
            totals = self.pipeline.forward_backward([self._to_device(batch) for batch in microbatches], count)
        settle(tensor for _, tensor in self._parameters())
        if self.pipeline is not None:
            for copy, original in self._tied.items():
                held = self._named.tensors.get(original) if 0 in self.stages else None
                copied = self._named.copies.get(copy)
                if any(tensor is not None and tensor.requires_grad for tensor in (held, copied)):
                    self.pipeline.sum_tied(held, copied)
        sums = {name: value / count for name, value in self._reduce(totals).items()}
        return sums | self._routers.collect(count)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        if self.pipeline is not None:
            return self._reduce(self.pipeline.evaluate(map(self._to_device, microbatches)))
        totals: Sums = {}
        for batch in microbatches:
            with self._autocast():
                _add(totals, self.stages[0](self._to_device(batch)))
        return self._reduce(totals)

    def clip_grad_norm(self) -> Tensor:
        copies = {id(copy) for copy in self._named.copies.values()}
        once = (tensor for tensor in self._named.tensors.values() if id(tensor) not in copies)
        norm = total_norm(once, self.device)
        if self.max_norm:
            clip((tensor for _, tensor in self._parameters()), self.max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, value in self._largest.items():
                self._named.tensors[name].clamp_(max=value)
        if self._ema:
            update_average(self.optimizer, self._ema)
        self._routers.settle()

    def sum_over_data(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        if self.mesh is None:
            return values
        dist.all_reduce(values)
        return -(-values // self.copies)

    def gradients(self) -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in self._named.tensors.items() if tensor.grad is not None}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        tensors = {name: tensor.detach() for name, tensor in self._named.tensors.items()}
        optimizer = optimizer_state(self.optimizer, self._parameters())
        known = {key: value for key, value in optimizer.items() if key.partition(".")[2] in tensors}
        return {"model": tensors, "optimizer": known | self._routers.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """`state_dict()` gave the live tensors, and reading filled them; what is left are second copies here, and what
        an evaluation has gathered of the old ones.
        """
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        for name, copy in self._named.copies.items():
            original = self._named.tensors[self._tied[name]]
            if original is not copy:
                copy.copy_(original)
                for key, value in self.optimizer.state[original].items():
                    self.optimizer.state[copy][key].copy_(value)

    @property
    def ties(self) -> dict[str, str]:
        return dict(self._tied)

    def close(self) -> None:
        self.optimizer.zero_grad()

    def _make_pipeline(self, spec: EngineSpec) -> Pipeline:
        assert self.mesh is not None
        pp, tp = self.mesh["pp"], self.mesh["tp"].size()

        def hidden_shape(batch: Batch) -> tuple[int, ...]:
            rows, length = batch[spec.sequence[0]].shape
            return rows, length // tp, spec.plan.hidden

        return Pipeline(
            self.stages,
            schedule=spec.parallel.schedule,
            num_stages=len(self.stages) * pp.size(),
            group=pp.get_group(),
            device=self.device,
            hidden_shape=hidden_shape,
            dtype=torch.float64 if spec.precision == "fp64" else torch.float32,
            sums=spec.sums,
            context=self._autocast,
            split_backward=not spec.compile and spec.recompute == "none",
        )

    def _parameters(self) -> list[tuple[str, Any]]:
        """All parameters of this process by the names of `state_dict()`, a second copy by its own."""
        held = self._named.tensors
        copies = self._named.copies.items()
        return [*held.items(), *((name, copy) for name, copy in copies if held[self._tied[name]] is not copy)]

    def _accumulate(self, microbatches: list[Batch], count: Tensor) -> Sums:
        totals: Sums = {}
        root = self.stages[0]
        for index, batch in enumerate(microbatches):
            reduce_over_replicas(root, index == len(microbatches) - 1)
            with self._autocast():
                sums = root(self._to_device(batch))
            (sums["loss"] / count).backward()
            _add(totals, sums)
        return totals

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

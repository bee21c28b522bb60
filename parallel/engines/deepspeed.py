"""DeepSpeed around the native modules: ZeRO 0 to 3, offloading.

Parameters, gradients, their sums and the optimizer stay in fp32; bf16 is autocast around them, as in the native engine
on a CPU. DeepSpeed divides gradients by the number of data processes: the loss is multiplied by it first. Clipping is
DeepSpeed's own, inside `step`.
"""

import logging
import os
import warnings
from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.across import check_across, over_data
from parallel.engine import Batch, EngineSpec, Sums
from parallel.engines.deepspeed_build import Computation, build_model, check_options, fill, make_config
from parallel.engines.deepspeed_options import DeepSpeedOptions
from parallel.engines.deepspeed_state import CutState, State, WholeState
from parallel.expert import Routers
from parallel.materialise import named_tensors
from parallel.mesh import SHARD_AXIS, Mesh, resolve_degrees
from parallel.optimizer_state import set_lr
from parallel.parallelize import modules_on_meta
from parallel.world import World


class DeepSpeedEngine:
    """See `parallel.engine.Engine`. One process alone joins a group of its own, which `close` leaves."""

    def __init__(self, spec: EngineSpec, world: World):
        options = DeepSpeedOptions.model_validate(dict(spec.options))
        check_options(options, spec.compile)
        degrees = resolve_degrees(spec.parallel, world.size)
        # How much of the state they share is for ZeRO to say: both axes are one.
        self.data_world = degrees["dp_replicate"] * degrees["dp_shard"]
        degrees |= {"dp_replicate": 1, "dp_shard": self.data_world}
        if spec.across is not None:
            check_across(degrees, spec.global_batch, spec.micro_batch)
        self.device, self.data_rank = world.device, world.rank
        # As DeepSpeed's launcher does; else ZeRO 3 on CPUs starts `numactl` for each bucket of gradients.
        os.environ.setdefault("LOCAL_SIZE", str(world.per_node or world.size))
        # Or it compiles a kernel of its own for processes of one machine, for minutes, where gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._alone = not dist.is_initialized()
        if self._alone:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        mesh = Mesh(degrees, world.device.type) if world.size > 1 else None
        if spec.across is not None:
            spec.across(over_data(mesh))
        self._accumulation = spec.global_batch // (spec.micro_batch * self.data_world)
        self._max_norm, self._largest = spec.clip_grad_norm, spec.plan.largest
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Of torch 2.13, about names that DeepSpeed 0.19 uses at every step.
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)

        model = build_model(spec)
        self.optimizer = spec.make_optimizer(model.named_parameters())
        positions = {id(p): index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        groups = {name: positions[id(p)] for name, p in model.named_parameters() if id(p) in positions}
        config = make_config(spec, options, self._accumulation, sum(p.numel() for p in model.parameters()))
        fill(model, spec, self.device, config, self.optimizer)
        self._named, self._ties = named_tensors(model)
        stage = Computation(model, spec, self.device)
        self.engine, *_ = deepspeed.initialize(model=stage, optimizer=self.optimizer, config=config)
        self._state: State = WholeState(self.optimizer, self._named)
        if options.zero:
            zero, hosts = self.engine.optimizer, _on_hosts(mesh, self.data_world)
            self._state = CutState(options.zero, zero, self.optimizer, self._named, groups, hosts)
        self._routers = Routers(modules_on_meta(spec, spec.plan.routing), [model], spec.plan.experts, self.device)

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        if len(microbatches) != self._accumulation:
            raise ValueError(f"{len(microbatches)} micro-batches in a step that was set up for {self._accumulation}")
        share = self.data_world / count  # DeepSpeed divides by data_world
        self._routers.begin(share)
        totals: Sums = {}
        for number, batch in enumerate(microbatches, 1):
            sums = self.engine(self._to_device(batch))
            self.engine.backward(sums["loss"] * share, scale_wrt_gas=False)
            _add(totals, sums)
            if number < self._accumulation:
                self.engine.step()  # counts micro-batches; updates after the last
        reduced = {name: value / count for name, value in self._reduce(totals).items()}
        return reduced | self._routers.collect(count)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        totals: Sums = {}
        for batch in microbatches:
            _add(totals, self.engine(self._to_device(batch)))
        return self._reduce(totals)

    def gradients(self) -> dict[str, Tensor]:
        """Whole ones on each process, before clipping: for comparing, not for training."""
        return self._state.gradients()

    def clip_grad_norm(self) -> Tensor:
        """The gradients themselves are scaled in `step` where ZeRO has cut them."""
        return self._state.clip(self._max_norm)

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.engine.step()
        self._state.stepped()
        with torch.no_grad():
            for name, value in self._largest.items():
                self._state.cap(name, value)
        self._routers.settle()

    def sum_over_data(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        dist.all_reduce(values)
        return values

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What ZeRO has cut: copies in host memory, each process its rows of each tensor."""
        state = self._state.read()
        return {"model": state["model"], "optimizer": state["optimizer"] | self._routers.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._state.write(state)

    @property
    def ties(self) -> dict[str, str]:
        return dict(self._ties)

    def close(self) -> None:
        self.engine.destroy()
        if self._alone:
            dist.destroy_process_group()

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _reduce(self, sums: Sums) -> Sums:
        if not sums:
            raise ValueError("no micro-batch was given: the data has fewer samples than one micro-batch needs")
        stacked = torch.stack(list(sums.values()))
        dist.all_reduce(stacked)
        return dict(zip(sums, stacked.unbind(), strict=True))


def _on_hosts(mesh: Mesh | None, processes: int) -> DeviceMesh | None:
    """The data processes, for tensors in host memory."""
    if mesh is None or mesh[SHARD_AXIS].device_type == "cpu":
        return None if mesh is None else mesh[SHARD_AXIS]
    return init_device_mesh("cpu", (processes,))


def _add(totals: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()

"""The fixed order in which a model is spread over processes, written once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.context import apply_context
from parallel.engine import EngineSpec
from parallel.fsdp import apply_fsdp
from parallel.materialise import init_parameters, materialise
from parallel.mesh import SHARD_AXIS, Mesh
from parallel.plan import match_modules, styles_of
from parallel.remat import apply_remat
from parallel.tensor import apply_tensor


class Stage(nn.Module):
    """Model, or a pipeline stage of it, and loss as one module, so that sharding wraps the head's use in the loss too.

    `stage(batch)`, `stage(batch, x)` with the output of the stage before: the sums of the loss, or hidden states where
    another stage follows.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Tensor], loss: Callable[..., Any] | None):
        super().__init__()
        self.model = model
        self._forward, self._loss = forward, loss

    def forward(self, batch: Any, x: Tensor | None = None) -> Any:
        hidden = self._forward(self.model, batch, x)
        return hidden if self._loss is None else self._loss(self.model, hidden, batch)


def parallelize(spec: EngineSpec, mesh: Mesh | None, device: torch.device) -> Stage:
    """Build on meta; cut matrices, then the sequence; recompute, compile, shard; then allocate and initialise.

    Compile comes before FSDP so that each block is one compiled graph and collectives stay outside; recomputation
    before compile, which then plans it. `mesh` None: one process. Raises ValueError for a plan that does not fit its
    model.
    """
    with torch.device("meta"):
        model: Any = spec.build()
    if spec.precision == "fp64":
        model.double()
    styles_of(model, spec.plan)
    blocks = match_modules(model, spec.plan.blocks).values()
    if mesh is not None and mesh["tp"].size() > 1:
        apply_tensor(model, spec.plan, mesh["tp"])
        model.tie_weights()
    if mesh is not None:
        for core in match_modules(model, spec.plan.attention).values():
            apply_context(core, mesh["cp"], spec.parallel.cp_method)
    for block in list(blocks)[:: spec.recompute_every]:
        apply_remat(block, spec.recompute)
    if spec.compile:
        for block in blocks:
            block.compile()
    stage = Stage(model, spec.forward, spec.loss)
    # On CPU autocast's own cast is cheaper than gathering in bf16.
    bf16 = spec.precision == "bf16" and device.type == "cuda"
    if mesh is not None and (bf16 or mesh["dp_replicate"].size() * mesh[SHARD_AXIS].size() > 1):
        options = spec.parallel
        apply_fsdp(
            stage,
            blocks,
            mesh,
            bf16=bf16,
            reshard_after_forward=options.reshard_after_forward,
            cpu_offload=options.cpu_offload,
        )
    materialise(model, torch.device("cpu") if spec.parallel.cpu_offload else device)
    init_parameters(model, spec.seed)
    return stage

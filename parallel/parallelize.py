"""The fixed order in which a model is spread over processes, written once."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.engine import EngineSpec
from parallel.fsdp import apply_fsdp
from parallel.materialise import init_parameters, materialise
from parallel.plan import match_modules
from parallel.remat import apply_remat


class LossModule(nn.Module):
    """Model and loss as one module, so that sharding wraps the head's use in the loss too."""

    def __init__(self, model: nn.Module, loss: Any):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


def parallelize(spec: EngineSpec, mesh: DeviceMesh | None, device: torch.device) -> LossModule:
    """Build on meta; then recompute, compile, shard; then allocate and initialise.

    Compile comes before FSDP so that each block is one compiled graph and collectives stay outside; recomputation
    before compile, which then plans it. `mesh` None: one process.
    """
    with torch.device("meta"):
        model = spec.build()
    blocks = match_modules(model, spec.plan.blocks).values()
    for block in blocks:
        apply_remat(block, spec.recompute)
    if spec.compile:
        for block in blocks:
            block.compile()
    root = LossModule(model, spec.loss)
    if mesh is not None:
        # On CPU autocast's own cast is cheaper than gathering in bf16.
        bf16 = spec.precision == "bf16" and device.type == "cuda"
        apply_fsdp(root, blocks, mesh, bf16=bf16, reshard_after_forward=spec.parallel.reshard_after_forward)
    materialise(model, device)
    init_parameters(model, spec.seed)
    return root

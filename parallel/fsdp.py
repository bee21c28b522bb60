"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer state cut over `dp_shard` and `cp`.

With `dp_replicate` > 1 this is HSDP: shards are replicated, and gradients all-reduced over the replicas.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from parallel.mesh import EXPERT_SHARD_AXIS, SHARD_AXIS, Mesh


def apply_fsdp(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    *,
    experts: Iterable[nn.Module] = (),
    bf16: bool,
    reshard_after_forward: bool,
    cpu_offload: bool = False,
) -> None:
    """Shard each block on its own, then what is left under `root`, in place; experts that ep has cut before their
    block, over what ep leaves of the processes.

    Gradients are summed over ranks in fp32 (fp64 ones in fp64), never averaged: the loss is already divided by the
    global count. With `bf16` the blocks' parameters are gathered in bf16, at half the bytes: what autocast would make
    of their matrices. The embedding and the head stay fp32, and with them the residual stream, as in one process.
    Raises ValueError for a parameter that cannot be cut evenly beside tensor parallelism.
    """
    outer = ("dp_replicate",) if mesh["dp_replicate"].size() > 1 else ()
    everyone = mesh[(*outer, SHARD_AXIS)]
    wide = torch.promote_types(next(root.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()

    def shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=offload,
            shard_placement_fn=lambda parameter: _shard_dim(parameter, mesh.size(-1)),
        )

    narrow = replace(policy, param_dtype=torch.bfloat16 if bf16 else None)
    if mesh.experts is not None:
        for module in experts:
            shard(module, mesh.experts[(*outer, EXPERT_SHARD_AXIS)], narrow, reshard_after_forward)
    for block in blocks:
        shard(block, everyone, narrow, reshard_after_forward)
    # What the root holds (embedding, head) is needed again at once: gathering it twice would be waste.
    shard(root, everyone, policy, False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def _shard_dim(parameter: nn.Parameter, processes: int) -> Shard | None:
    """The dim to cut; None: the first. What another axis has cut already must be cut evenly again (torch cannot name
    uneven pieces of pieces), and stacks of matrices are few: both take the first dim that divides.
    """
    cut = [1] * parameter.ndim  # into how many pieces each dim is cut already
    if isinstance(parameter, DTensor):
        for axis, place in enumerate(parameter.placements):
            if isinstance(place, Shard):
                cut[place.dim] *= parameter.device_mesh.size(axis)
    if cut[0] == 1 and parameter.ndim < 3:
        return None
    for dim, (size, pieces) in enumerate(zip(parameter.shape, cut, strict=True)):
        if size % (pieces * processes) == 0:
            return Shard(dim)
    if cut[0] == 1:
        return None
    raise ValueError(
        f"a parameter of shape {list(parameter.shape)}, cut into {cut} by parallel.tp and parallel.ep, cannot be cut "
        f"evenly over the {processes} processes that parallel.dp_shard x parallel.cp leaves it; choose degrees that "
        "divide it, or raise parallel.dp_replicate"
    )


def reduce_over_replicas(root: nn.Module, enabled: bool) -> None:
    """HSDP with accumulation: all-reduce over replicas in the last micro-batch's backward only."""
    if isinstance(root, FSDPModule):
        cast(FSDPModule, root).set_requires_all_reduce(enabled)


def widen_gradients(root: nn.Module) -> None:
    """Add gradients that stand in bf16 to those accumulated in the dtype that they are reduced in.

    FSDP does so in a hook of backward, past which a zero-bubble schedule's backward of the weights alone goes: further
    micro-batches would be added in bf16.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.13: one
            for group in groups:
                for parameter in group.fsdp_params if group is not None else ():
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()

"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer state cut over `dp_shard` and `cp`.

With `dp_replicate` > 1 this is HSDP: shards are replicated, and gradients all-reduced over the replicas.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from parallel.mesh import SHARD_AXIS, Mesh


def apply_fsdp(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    *,
    bf16: bool,
    reshard_after_forward: bool,
    cpu_offload: bool = False,
) -> None:
    """Shard each block on its own, then what is left under `root`, in place.

    Gradients are summed over ranks in fp32 (fp64 ones in fp64), never averaged: the loss is already divided by the
    global count. With `bf16` the blocks' parameters are gathered in bf16, at half the bytes: what autocast would make
    of their matrices. The embedding and the head stay fp32, and with them the residual stream, as in one process.
    Raises ValueError for a parameter that cannot be cut evenly beside tensor parallelism.
    """
    axes = ("dp_replicate", SHARD_AXIS) if mesh["dp_replicate"].size() > 1 else (SHARD_AXIS,)
    processes = mesh[SHARD_AXIS].size()
    wide = torch.promote_types(next(root.parameters()).dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=mesh[axes],
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=offload,
            shard_placement_fn=lambda parameter: _shard_dim(parameter, processes),
        )

    for block in blocks:
        shard(block, replace(policy, param_dtype=torch.bfloat16 if bf16 else None), reshard_after_forward)
    # What the root holds (embedding, head) is needed again at once: gathering it twice would be waste.
    shard(root, policy, False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def _shard_dim(parameter: nn.Parameter, processes: int) -> Shard | None:
    """The dim to cut; None: the first. Rows that tensor parallelism has cut already must be cut evenly again (torch
    cannot name uneven pieces of pieces); else columns are.
    """
    if not isinstance(parameter, DTensor) or not parameter.placements[0].is_shard(0):
        return None
    rows = parameter.shape[0]
    if rows % (parameter.device_mesh.size() * processes) == 0:
        return None
    if parameter.ndim > 1 and parameter.shape[1] % processes == 0:
        return Shard(1)
    tp = parameter.device_mesh.size()
    raise ValueError(
        f"a parameter of shape {list(parameter.shape)} cannot be cut evenly over parallel.tp = {tp} and "
        f"parallel.dp_shard x parallel.cp = {processes}; choose degrees that divide it, or raise parallel.dp_replicate"
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

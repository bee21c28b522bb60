"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer state cut over `dp_shard`.

With `dp_replicate` > 1 this is HSDP: shards are replicated, and gradients all-reduced over the replicas.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def apply_fsdp(
    root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, bf16: bool, reshard_after_forward: bool
) -> None:
    """Shard each block on its own, then what is left under `root`, in place.

    Gradients are summed over ranks in fp32, never averaged: the loss is already divided by the global count. With
    `bf16` the blocks' parameters are gathered in bf16, at half the bytes: what autocast would make of their matrices.
    The embedding and the head stay fp32, and with them the residual stream, as in one process.
    """
    axes = ("dp_replicate", "dp_shard") if mesh["dp_replicate"].size() > 1 else ("dp_shard",)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_blocks = replace(policy, param_dtype=torch.bfloat16 if bf16 else None)
    for block in blocks:
        fully_shard(block, mesh=mesh[axes], mp_policy=of_blocks, reshard_after_forward=reshard_after_forward)
    # What the root holds (embedding, head) is needed again at once: gathering it twice would be waste.
    fully_shard(root, mesh=mesh[axes], mp_policy=policy, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def reduce_over_replicas(root: nn.Module, enabled: bool) -> None:
    """HSDP with accumulation: all-reduce over replicas in the last micro-batch's backward only."""
    if isinstance(root, FSDPModule):
        cast(FSDPModule, root).set_requires_all_reduce(enabled)

"""Tensor and sequence parallelism: a plan's styles applied as DTensor placements.

    residual stream  [B, S/tp, E]   plain tensors, cut along the sequence
    gather           [B, S, E]      all-gathered before attention and feed-forward; backward reduce-scatters
    column           [B, S, F/tp]   each process its own heads or features
    row              [B, S/tp, E]   partial sums reduce-scattered; backward all-gathers

Sources: Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from parallel.plan import Plan, Style, styles_of

ROWS, COLUMNS = Shard(0), Shard(1)  # of a weight
SEQUENCE, HEADS, FEATURES, WHOLE = Shard(1), Shard(2), Shard(-1), Replicate()  # of activations


@dataclass(frozen=True)
class Layout:
    """weight, bias: how the parameters lie. given: how the first input arrives, unless it is a DTensor; wanted: how
    `forward` takes it. output: how the result leaves, as a plain tensor; None: as it comes. parts: each process uses a
    whole output in its own way, and the gradients that they have for it are parts of a sum.
    """

    weight: Placement | None
    bias: Placement | None
    given: Placement
    wanted: Placement
    output: Placement | None
    parts: bool = False


STYLES: dict[Style, Layout] = {
    "gather": Layout(None, None, SEQUENCE, WHOLE, None),
    "column": Layout(ROWS, ROWS, WHOLE, WHOLE, FEATURES),
    "part_column": Layout(ROWS, ROWS, SEQUENCE, WHOLE, FEATURES),
    "key_value": Layout(ROWS, ROWS, WHOLE, WHOLE, FEATURES),
    "row": Layout(COLUMNS, WHOLE, FEATURES, FEATURES, SEQUENCE),
    "sequence": Layout(WHOLE, WHOLE, SEQUENCE, SEQUENCE, SEQUENCE),
    "whole": Layout(WHOLE, WHOLE, WHOLE, WHOLE, WHOLE),
    "collect": Layout(None, None, SEQUENCE, WHOLE, WHOLE),
    "share": Layout(None, None, SEQUENCE, WHOLE, WHOLE, parts=True),
    "position": Layout(WHOLE, WHOLE, WHOLE, SEQUENCE, SEQUENCE),
    "head_norm": Layout(WHOLE, WHOLE, HEADS, HEADS, HEADS),
    "width_norm": Layout(ROWS, ROWS, FEATURES, FEATURES, FEATURES),
    "vocabulary": Layout(ROWS, None, WHOLE, WHOLE, SEQUENCE),
    "head": Layout(ROWS, ROWS, SEQUENCE, WHOLE, FEATURES),
}


def apply_tensor(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Distribute the parameters of `model` over `mesh` (axis tp) and make its modules communicate, in place."""
    for name, style in styles_of(model, plan).items():
        if style == "experts":
            continue
        module, layout = model.get_submodule(name), STYLES[style]
        if style == "key_value" and plan.kv_heads % mesh.size():
            _place(module, mesh, WHOLE, WHOLE)
            _share_heads(module, plan, mesh)
        else:
            _place(module, mesh, layout.weight, layout.bias)
            _communicate(module, mesh, layout)


def check_tensor(plan: Plan, tp: int, seq_len: int) -> None:
    """Raises ValueError when `tp` processes cannot share the heads, or the `seq_len` tokens that cp leaves them."""
    every = (plan.heads, *plan.tower_heads)
    if any(heads % tp for heads in every):
        shared = gcd(*every)
        legal = [degree for degree in range(1, shared + 1) if shared % degree == 0]
        named = " and ".join(map(str, dict.fromkeys(every)))
        raise ValueError(f"parallel.tp = {tp} does not divide the model's {named} heads; set it to one of {legal}")
    if seq_len % tp:
        raise ValueError(
            f"parallel.tp = {tp} does not divide the {seq_len} tokens of a sequence that parallel.cp leaves each "
            "process; make data.seq_len a multiple of parallel.tp x parallel.cp"
        )


def _place(module: nn.Module, mesh: DeviceMesh, weight: Placement | None, bias: Placement | None) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = bias if name == "bias" else weight
        assert placement is not None, f"{name} of {type(module).__name__} has no placement"
        placed = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))


def _communicate(module: nn.Module, mesh: DeviceMesh, layout: Layout) -> None:
    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if isinstance(args[0], DTensor) else DTensor.from_local(args[0], mesh, [layout.given])
        # Where nothing moves, no redistribution either: its backward would all-reduce each consumer's partial gradient,
        # which are better summed here and reduce-scattered once.
        return (x if x.placements == (layout.wanted,) else x.redistribute(placements=[layout.wanted]), *args[1:])

    def after(_module: nn.Module, _args: Any, output: DTensor) -> Tensor:
        assert layout.output is not None
        partial = [Partial()] if layout.parts else None
        return output.redistribute(placements=[layout.output]).to_local(grad_placements=partial)

    module.register_forward_pre_hook(before)
    if layout.output is not None:
        module.register_forward_hook(after)


def _share_heads(module: Any, plan: Plan, mesh: DeviceMesh) -> None:
    """A key/value projection whose heads cannot be cut evenly: each process applies those of the replicated heads that
    its own query heads attend to, and the gradient is the sum of what all contribute.
    """
    mine = local_kv_heads(plan, mesh.get_local_rank(), mesh.size())

    def own(parameter: Any) -> Tensor:
        by_head = parameter.to_local(grad_placements=[Partial()]).unflatten(0, (plan.kv_heads, -1))
        return torch.cat([by_head[head] for head in mine])

    def project(x: Any) -> Tensor:
        bias = None if module.bias is None else own(module.bias)
        return F.linear(x.to_local(grad_placements=[Partial()]), own(module.weight), bias)

    module.forward = project


def local_kv_heads(plan: Plan, rank: int, size: int) -> list[int]:
    """Key/value heads of the query heads of `rank`: each once where that makes equal groups, else one a query head."""
    per_rank, group = plan.heads // size, plan.heads // plan.kv_heads
    wanted = [head // group for head in range(rank * per_rank, (rank + 1) * per_rank)]
    distinct = sorted(set(wanted))
    return distinct if all(wanted.count(head) * len(distinct) == per_rank for head in distinct) else wanted

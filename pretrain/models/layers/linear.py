"""Matrix products: the dtype they are computed in; several projections of one input as one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: its own dtype, or autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fused_linear(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Apply each linear to x [..., E]: one output [..., F_i] each.

    One matmul over the concatenated weights reads x once and gives one input gradient; under autocast and compile the
    concatenation melts into the cast of the weights. Weights stay separate parameters: sharding, Muon and conversion
    see the matrices they expect. Distributed weights (they have placements) go through their own modules.
    """
    if any(hasattr(linear.weight, "placements") for linear in linears):
        return tuple(linear(x) for linear in linears)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)

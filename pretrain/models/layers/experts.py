"""The feed-forward networks of a mixture of experts, stacked, and the rows that go to them.

Shape letters: T tokens, H hidden, F width of an expert, E experts, K experts a token takes, N rows.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers.mlp import ACTIVATIONS, Activation

Method = Literal["auto", "grouped", "bucketed", "loop"]

SLACK = 0.75  # experts share a batched product down to this share of the fullest one's rows
FEW = 16  # rows: fewer cost as much as these


class Experts(nn.Module):
    """rows [N, H], sorted by expert, and counts [E] -> rows: down(act(gate(x)) * up(x)), each by its own expert.

    Weights are stacked as [experts, out, in]. `weights()` gives those to compute with, an expert for each count.
    """

    def __init__(self, experts: int, hidden: int, ffn: int, activation: Activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.method: Method = "auto"

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        weights = self.weights()
        if torch.is_autocast_enabled(x.device.type):  # not every product of many matrices is on autocast's list
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), (weights[0].to(dtype), weights[1].to(dtype), weights[2].to(dtype))
        method = self.method
        if method == "auto":
            method = "grouped" if x.is_cuda and x.dtype == torch.bfloat16 else "bucketed"
        return METHODS[method](x, counts, weights, self.activation)


Weights = tuple[Tensor, Tensor, Tensor]
Compute = Callable[[Tensor, Tensor, Weights, Callable[[Tensor], Tensor]], Tensor]


def grouped(x: Tensor, counts: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One kernel for all experts; counts stay on the device."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up, down = (weight.transpose(-2, -1) for weight in weights)
    inner = activation(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    return F.grouped_mm(inner, down, offs=ends)


def bucketed(x: Tensor, counts: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Batched products over experts with about as many rows, padded to the fullest of them."""
    rows = counts.tolist()
    buckets = make_buckets(rows)
    if len(buckets) == 1 and min(rows) == max(rows):
        return _batched(x.view(len(rows), rows[0], x.shape[-1]), weights, activation).flatten(0, 1)
    starts = (counts.cumsum(0) - counts).tolist()
    found = []
    for bucket in buckets:
        most = max(rows[expert] for expert in bucket)
        chosen = torch.tensor(bucket, device=x.device)
        own = torch.cat([torch.arange(starts[e], starts[e] + rows[e], device=x.device) for e in bucket])
        places = torch.cat([torch.arange(n * most, n * most + rows[e], device=x.device) for n, e in enumerate(bucket)])
        padded = _Move.apply(x, own, places, len(bucket) * most).view(len(bucket), most, x.shape[1])
        part = (weights[0][chosen], weights[1][chosen], weights[2][chosen]) if len(buckets) > 1 else weights
        found.append((_batched(padded, part, activation).flatten(0, 1), places, own))
    if len(found) == 1:
        return _Move.apply(found[0][0], found[0][1], found[0][2], len(x))
    return torch.stack([_Move.apply(y, places, own, len(x)) for y, places, own in found]).sum(0)


def make_buckets(rows: list[int]) -> list[list[int]]:
    """Experts in groups, fullest first within; in the order of experts where one group holds all."""
    order = sorted(range(len(rows)), key=lambda expert: -rows[expert])
    buckets: list[list[int]] = []
    for expert in order:
        if buckets and max(rows[expert], FEW) >= SLACK * max(rows[buckets[-1][0]], FEW):
            buckets[-1].append(expert)
        else:
            buckets.append([expert])
    return buckets if len(buckets) > 1 else [sorted(order)]


def loop(x: Tensor, counts: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One expert after the other: the reference."""
    parts = x.split(counts.tolist())
    found = [
        F.linear(activation(F.linear(part, gate)) * F.linear(part, up), down)
        for part, gate, up, down in zip(parts, *weights, strict=True)
    ]
    return torch.cat(found)


def _batched(x: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up, down = (weight.transpose(1, 2) for weight in weights)
    return (activation(x @ gate) * (x @ up)) @ down


METHODS: dict[str, Compute] = {"grouped": grouped, "bucketed": bucketed, "loop": loop}


class _Move(torch.autograd.Function):
    """x [N, H]: rows `source` of it stand at rows `target` of the result [rows, H], zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.rows = len(x)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        (grad,) = grads
        out = grad.new_zeros(ctx.rows, grad.shape[1])
        return out.index_copy_(0, source, grad.index_select(0, target)), None, None, None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _at(grads[0], slots).sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, token, slots)
        return (_at(rows, slots) * weight.to(rows.dtype)[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, token, slots = ctx.saved_tensors
        (grad,) = grads
        for_weight = (_at(rows, slots) * grad[:, None]).sum(-1, dtype=weight.dtype)
        by_row = weight.new_zeros(len(rows) + 1).index_copy_(0, slots.flatten(), weight.flatten())[:-1]
        return grad.index_select(0, token) * by_row.to(grad.dtype)[:, None], for_weight, None, None


def dispatch(x: Tensor, token: Tensor, slots: Tensor) -> Tensor:
    """x [T, H] -> rows [N, H], a token's number at each. slots [T, K]: where its rows stand, N for none."""
    return _Dispatch.apply(x, token, slots)


def combine(rows: Tensor, weight: Tensor, token: Tensor, slots: Tensor) -> Tensor:
    """rows [N, H] -> [T, H]: the weighted sum of each token's rows. weight [T, K]."""
    return _Combine.apply(rows, weight, token, slots)


def _at(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [N, H], slots [T, K] -> [T, K, H], zeros where a slot is N."""
    if slots.numel() != len(rows):
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, slots.flatten()).unflatten(0, slots.shape)

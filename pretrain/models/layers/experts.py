"""The feed-forward networks of a mixture of experts, stacked, and the rows that go to them.

Shape letters: T tokens, H hidden, F width of an expert, E experts, K experts a token takes, N rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers.mlp import ACTIVATIONS, Activation


class Experts(nn.Module):
    """rows [N, H], sorted by expert, and counts [E] -> rows: down(act(gate(x)) * up(x)), each by its own expert and
    computed in the dtype of rows.

    Weights are stacked as [experts, out, in]. `weights()` gives those to compute with, an expert for each count.
    """

    def __init__(self, experts: int, hidden: int, ffn: int, activation: Activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        gate, up, down = (weight.to(x.dtype) for weight in self.weights())
        compute = grouped if x.is_cuda and x.dtype == torch.bfloat16 else loop
        return compute(x, counts, (gate, up, down), self.activation)


Weights = tuple[Tensor, Tensor, Tensor]


def grouped(x: Tensor, counts: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One kernel for all experts; counts stay on the device."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up, down = (weight.transpose(-2, -1) for weight in weights)
    inner = activation(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    return F.grouped_mm(inner, down, offs=ends)


def loop(x: Tensor, counts: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One expert after the other. On a CPU batched products over padded experts, and products written in place into
    stacked results, were no faster (tests/bench/RESULTS.md)."""
    parts = x.split(counts.tolist())
    found = [
        F.linear(activation(F.linear(part, gate)) * F.linear(part, up), down)
        for part, gate, up, down in zip(parts, *weights, strict=True)
    ]
    return torch.cat(found)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        rows = _with_zeros(grads[0], slots)
        out = rows.index_select(0, slots[:, 0])
        for k in range(1, slots.shape[1]):
            out += rows.index_select(0, slots[:, k])
        return out, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, token, slots)
        rows, weight = _with_zeros(rows, slots), weight.to(rows.dtype)
        out = rows.index_select(0, slots[:, 0]) * weight[:, :1]
        for k in range(1, slots.shape[1]):
            out.addcmul_(rows.index_select(0, slots[:, k]), weight[:, k : k + 1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, token, slots = ctx.saved_tensors
        of_rows = grads[0].index_select(0, token)
        for_weight = _with_zeros((rows * of_rows).sum(-1, dtype=weight.dtype), slots)[slots]
        by_row = weight.new_empty(len(rows) + 1).index_copy_(0, slots.flatten(), weight.flatten())[:-1]
        return of_rows.mul_(by_row.to(of_rows.dtype)[:, None]), for_weight, None, None


def dispatch(x: Tensor, token: Tensor, slots: Tensor) -> Tensor:
    """x [T, H] -> rows [N, H], a token's number at each. slots [T, K]: where its rows stand, N for none."""
    return _Dispatch.apply(x, token, slots)


def combine(rows: Tensor, weight: Tensor, token: Tensor, slots: Tensor) -> Tensor:
    """rows [N, H] -> [T, H]: the weighted sum of each token's rows. weight [T, K]."""
    return _Combine.apply(rows, weight, token, slots)


def _with_zeros(rows: Tensor, slots: Tensor) -> Tensor:
    """A zero after the rows, for slots of what was dropped."""
    return rows if slots.numel() == len(rows) else torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])

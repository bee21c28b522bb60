"""The feed-forward networks of a mixture of experts, stacked, and the rows that go to them.

Shape letters: T tokens, H hidden, F width of an expert, E experts, K experts a token takes, N rows.
"""

import itertools
from collections.abc import Callable, Sequence
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
            narrow = x.dtype == torch.bfloat16
            method = ("grouped" if narrow else "bucketed") if x.is_cuda else "loop"  # as bench_moe measured
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
    if min(rows) == max(rows):
        return _batched(x.view(len(rows), rows[0], x.shape[1]), weights, activation).flatten(0, 1)
    padding = _Padding(rows, x.device)
    found = []
    for bucket, padded in zip(padding.buckets, _Pad.apply(x, padding), strict=True):
        own = weights if len(bucket) == len(rows) else _pick(weights, torch.tensor(bucket, device=x.device))
        found.append(_batched(padded.view(len(bucket), -1, x.shape[1]), own, activation).flatten(0, 1))
    return _Unpad.apply(padding, *found)


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


def _pick(weights: Weights, experts: Tensor) -> Weights:
    gate, up, down = (weight.index_select(0, experts) for weight in weights)
    return gate, up, down


def _batched(x: Tensor, weights: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up, down = (weight.transpose(1, 2) for weight in weights)
    return (activation(x @ gate) * (x @ up)) @ down


METHODS: dict[str, Compute] = {"grouped": grouped, "bucketed": bucketed, "loop": loop}


class _Padding:
    """Which row stands where. take: for each bucket, the row at each place; places: where the rows are among them;
    pads: places that are none's, at which some row stands for nothing. back: where each row is, buckets in line."""

    def __init__(self, rows: list[int], device: torch.device):
        self.buckets = [bucket for bucket in make_buckets(rows) if any(rows[expert] for expert in bucket)]
        starts = list(itertools.accumulate(rows, initial=0))
        self.take, self.places, self.pads = [], [], []
        for bucket in self.buckets:
            most = max(rows[expert] for expert in bucket)
            first, real = (torch.tensor([of[e] for e in bucket])[:, None] for of in (starts, rows))
            place = torch.arange(most)
            there = (place < real).flatten()
            self.take.append((first + place.expand_as(first + place)).flatten().where(there, first[0]).to(device))
            self.places.append(there.nonzero()[:, 0].to(device))
            self.pads.append((~there).nonzero()[:, 0].to(device))
        self.back: Tensor | None = None
        if len(self.buckets) > 1:
            line = torch.cat([take[places] for take, places in zip(self.take, self.places, strict=True)])
            self.back = torch.empty_like(line).index_copy_(0, line, torch.arange(len(line), device=device))

    def gather(self, padded: Sequence[Tensor]) -> Tensor:
        """Of padded buckets their rows, in the order of experts."""
        found = [part.index_select(0, places) for part, places in zip(padded, self.places, strict=True)]
        return found[0] if self.back is None else torch.cat(found).index_select(0, self.back)


class _Pad(torch.autograd.Function):
    """x [N, H] -> buckets [places, H]. What stands at pads must get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: _Padding) -> tuple[Tensor, ...]:
        ctx.padding = padding
        return tuple(x.index_select(0, take) for take in padding.take)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.padding.gather(grads), None


class _Unpad(torch.autograd.Function):
    """Buckets [places, H] -> rows [N, H]."""

    @staticmethod
    def forward(ctx: Any, padding: _Padding, *padded: Tensor) -> Tensor:
        ctx.padding = padding
        return padding.gather(padded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padding: _Padding = ctx.padding
        parts = zip(padding.take, padding.pads, strict=True)
        return None, *(grads[0].index_select(0, take).index_fill_(0, pads, 0.0) for take, pads in parts)


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

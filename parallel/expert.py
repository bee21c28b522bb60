"""Expert parallelism: processes that share the experts send each row to where its expert is, and get it back.

    rows by expert   --all-to-all over ep-->   rows for the experts here, of all processes of ep
    cut matrices     --all-gather over tp-->   the rows of all processes of tp, each with its part of every expert

`ep` is carved out of dp_shard x cp, so each process of it has tokens of its own: gradients of experts are sums over
what arrived and need no factor. Where `Plan.experts` are cut over tp too, `down` is cut as row, the others as column;
else each process of tp sends its own part of the sequence through whole experts.

Sources: Lepikhin et al. 2020 (arXiv:2006.16668), Rajbhandari et al. 2022 (arXiv:2201.05596).
Shape letters: N rows, H hidden, E experts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from parallel.mesh import Mesh
from parallel.plan import Plan, match_modules, styles_of

Sums = dict[str, Tensor]


def check_experts(plan: Plan, ep: int) -> None:
    """Raises ValueError when `ep` processes cannot share the experts."""
    if ep > 1 and not plan.experts:
        raise ValueError(f"parallel.ep = {ep}, but the model has no experts; set parallel.ep to 1")
    if plan.experts % ep:
        legal = [degree for degree in range(1, plan.experts + 1) if plan.experts % degree == 0]
        raise ValueError(
            f"parallel.ep = {ep} does not divide the model's {plan.experts} experts; set it to one of {legal}"
        )


def apply_experts(model: nn.Module, plan: Plan, mesh: Mesh, over_tp: bool) -> None:
    """Distribute the experts of `model` over ep and tp and make them communicate, in place.

    over_tp: cut each expert's matrices over tp. Nothing is to do where neither axis is above 1.
    """
    ep, tp = None if mesh.experts is None else mesh.experts["ep"], mesh["tp"]
    grid = tp if mesh.experts is None else mesh.experts["ep", "tp"]
    if grid.size() == 1:
        return
    for name, style in styles_of(model, plan).items():
        if style == "experts":
            experts = model.get_submodule(name)
            _place(experts, grid, over_tp)
            _communicate(experts, ep, tp if over_tp and tp.size() > 1 else None)


def share_routing(model: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """Let each router see the other parts of its sequences, for what it decides or balances over whole sequences."""
    axes = [mesh[name] for name in ("tp", "cp") if mesh[name].size() > 1]

    def gather(part: Tensor) -> tuple[Tensor, int]:
        parts, own = part[None], 0
        for axis in axes:  # tp first: cp is the outer axis
            every = [torch.empty_like(parts) for _ in range(axis.size())]
            dist.all_gather(every, parts.contiguous(), group=axis.get_group())
            own += axis.get_local_rank() * len(parts)
            parts = torch.cat(every)
        return parts, own

    for routing in match_modules(model, plan.routing).values():
        routing.gather = gather  # type: ignore[assignment]


def _place(experts: nn.Module, grid: DeviceMesh, over_tp: bool) -> None:
    for name, parameter in list(experts.named_parameters(recurse=False)):
        inner = Shard(2 if name == "down" else 1) if over_tp else Replicate()
        placements = [Shard(0), inner] if grid.ndim == 2 else [inner]
        placed = distribute_tensor(parameter.data, grid, placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))


def _communicate(experts: Any, ep: DeviceMesh | None, tp: DeviceMesh | None) -> None:
    compute, weights = experts.forward, experts.weights

    def local(parameter: DTensor) -> Tensor:
        """This process's experts. Whole ones work on this process's tokens alone: gradients are partial over tp."""
        placements = [Partial() if place.is_replicate() else place for place in parameter.placements]
        return parameter.to_local(grad_placements=placements)

    def forward(x: Tensor, counts: Tensor) -> Tensor:
        trip = _Trip(counts, ep, tp)
        return trip.back(compute(trip.there(x), trip.counts))

    experts.weights = lambda: tuple(local(parameter) for parameter in weights())
    experts.forward = forward


class _Trip:
    """One way there and back for rows that are sorted by expert. counts: rows here by expert [E]; afterwards those that
    the experts here get."""

    def __init__(self, counts: Tensor, ep: DeviceMesh | None, tp: DeviceMesh | None):
        self.ep, self.tp = None if ep is None else ep.get_group(), None if tp is None else tp.get_group()
        owners = 1 if ep is None else ep.size()
        leaving = arriving = counts.view(owners, -1)
        if self.ep is not None:
            arriving = torch.empty_like(leaving)
            dist.all_to_all_single(arriving, leaving.contiguous(), group=self.ep)
        parts = arriving[None]
        if tp is not None:
            every = [torch.empty_like(arriving) for _ in range(tp.size())]
            dist.all_gather(every, arriving.contiguous(), group=self.tp)
            parts = torch.stack(every)
        self.counts = parts.sum((0, 1))
        # The only wait for the device: how much to send and to expect.
        sizes = torch.cat([leaving.sum(1), arriving.sum(1), parts.sum((1, 2))]).tolist()
        self.sent, self.received, self.shares = sizes[:owners], sizes[owners : 2 * owners], sizes[2 * owners :]
        expert = torch.arange(parts.shape[-1], device=counts.device).repeat(len(parts) * owners)
        self.order = expert.repeat_interleave(parts.flatten()).argsort(stable=True)

    def there(self, x: Tensor) -> Tensor:
        """x [N, H] by expert of all processes -> rows by expert of this one."""
        if self.ep is not None:
            x = _exchange(x, self.received, self.sent, self.ep)
        if self.tp is not None:
            x = _exchange(x.repeat(len(self.shares), 1), self.shares, [len(x)] * len(self.shares), self.tp)
        return _Permute.apply(x, self.order)

    def back(self, y: Tensor) -> Tensor:
        y = _Unpermute.apply(y, self.order)
        if self.tp is not None:
            own = self.shares[dist.get_rank(self.tp)]
            y = _exchange(y, [own] * len(self.shares), self.shares, self.tp)
            y = y.view(len(self.shares), own, y.shape[-1]).sum(0)
        if self.ep is not None:
            y = _exchange(y, self.sent, self.received, self.ep)
        return y


def _exchange(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    return all_to_all_single_autograd(x.contiguous(), received, sent, group.group_name)


class _Permute(torch.autograd.Function):
    """Row i of the result is row order[i] of x; backward scatters, with no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(grads[0]).index_copy_(0, ctx.saved_tensors[0], grads[0]), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(y).index_copy_(0, order, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None


class Routers:
    """The routers of all layers: their share of the loss, what they saw, their state.

    routing: modules of the whole model, by name; models: what this process holds of it.
    """

    SUMS = ("router_entropy", "router_dropped", "balance_loss", "z_loss")

    def __init__(self, routing: Mapping[str, Any], models: Iterable[nn.Module], experts: int, device: torch.device):
        held = {name: module for model in models for name, module in model.named_modules()}
        self.names = names = list(routing)
        self.biased = any(module.bias is not None for module in routing.values())
        self.held: Mapping[str, Any] = {name: held[name] for name in names if name in held}
        self.table = torch.zeros(len(names), experts + len(self.SUMS), dtype=torch.float64, device=device)
        for own in self.held.values():
            own.load = torch.full((experts,), 1 / experts, dtype=torch.float64, device=device)

    def begin(self, share: Tensor) -> None:
        """share: of a sum over tokens in the loss."""
        for routing in self.held.values():
            routing.begin(share)

    def collect(self, count: Tensor) -> Sums:
        """What the routers saw since `begin`, over all processes and divided by `count`: rows of each expert
        [layers, E], the others [layers]; and "router_bias", 2-norms [layers], where routers have one. Collective.
        """
        if not self.names:
            return {}
        self.table.zero_()
        norms = torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.table.device)  # sum, over how many
        for row, norm, name in zip(self.table, norms, self.names, strict=True):
            routing = self.held.get(name)
            if routing is not None and routing.seen is not None:
                row.copy_(routing.seen)
            if routing is not None and routing.bias is not None:
                norm += torch.stack([routing.bias.double().norm(), norm.new_ones(())])
        everything = torch.cat([self.table, norms], 1)
        if dist.is_initialized():
            dist.all_reduce(everything)
        self.table, norms = everything[:, :-2], everything[:, -2:]
        rows, sums = self.table[:, : -len(self.SUMS)], self.table[:, -len(self.SUMS) :]
        found = {"router_rows": rows / count, **dict(zip(self.SUMS, (sums / count).unbind(1), strict=True))}
        return found | ({"router_bias": norms[:, 0] / norms[:, 1]} if self.biased else {})

    def settle(self) -> None:
        """After the optimizer's step: biases move by the load of the global batch."""
        for row, name in zip(self.table, self.names, strict=True):
            if name in self.held:
                self.held[name].settle(row[: -len(self.SUMS)])

    def state_dict(self) -> Sums:
        """ "load.<router>": live tensors, the same on every process that has the layer."""
        return {f"load.{name}": routing.load for name, routing in self.held.items()}

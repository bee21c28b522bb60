"""Mixture of experts: a router sends each token to a few of many feed-forward networks.

    router    Linear      hidden states -> logits, in fp32 or fp64
    routing   Routing     logits -> which experts, with which weight; balancing; what the router did
    experts   Experts     rows sorted by expert -> rows (expert parallelism wraps this one)
    shared    GatedMLP    sees every token

Shape letters: B batch, S sequence, T = B * S tokens, H hidden, F width of an expert, E experts, K experts of a token,
N = T * K rows, fewer where a capacity drops some.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers.experts import Experts, combine, dispatch
from pretrain.models.layers.linear import product_dtype
from pretrain.models.layers.mlp import Activation, GatedMLP


@dataclass(frozen=True)
class MoE:
    """The recipe's `[model.moe]`: which layers are sparse, how tokens choose, how load is balanced.

    A router's balancing loss for a token is E * sum over experts of f * p, with f the share of all routes that an
    expert gets over `balance` and p the token's score for it, scores summing to 1 (Fedus et al. 2021,
    arXiv:2101.03961). Over "global", f is that of the last step's global batch: it is the same under every layout and
    accumulation, and costs no communication in forward (on the size of the batch: Qiu et al. 2025, arXiv:2501.11873).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic

    experts: int = 8
    top_k: int = 2
    ffn: int = 1024  # width inside one expert
    first_dense: int = 0  # layers at the start that stay dense
    every: int = 1  # of the others, every n-th is sparse, the last of each n
    shared_ffn: int = 0  # width of the experts that see every token, all together; 0 for none
    shared_gate: bool = False  # their output is weighted by a sigmoid of its own

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # weights of a token's experts are divided by their sum
    scale: float = 1.0  # factor on weights, after normalising
    groups: int = 1  # experts are in so many groups of neighbours, of which a token may use
    top_groups: int = 1  # the best of so many
    group_score: Literal["max", "top2"] = "max"  # of a group: its best expert, or the sum of its best two
    precision: Literal["fp32", "fp64"] = "fp32"  # the router's arithmetic
    choice: Literal["token", "expert"] = "token"  # who chooses; experts choose top_k * S / E tokens of each sequence
    capacity: float = 0.0  # rows an expert takes of each sequence, over top_k * S / E; the rest is dropped; 0: dropless

    balance: Literal["none", "sequence", "micro_batch", "global"] = "global"  # over what load is to be even
    balance_weight: float = 0.01
    z_weight: float = 0.0  # on log(sum(exp(logits)))**2 (Zoph et al. 2022, arXiv:2202.08906)
    bias: bool = False  # a bias on scores that only chooses; set by load instead of a loss (arXiv:2408.15664)
    bias_rate: float = 0.001  # what it moves by after each step

    def __post_init__(self) -> None:
        def need(fine: bool, key: str, what: str) -> None:
            if not fine:
                raise ValueError(f"model.moe.{key} = {getattr(self, key)}: {what}")

        for key in ("experts", "top_k", "ffn", "every", "groups", "top_groups"):
            need(getattr(self, key) >= 1, key, "must be at least 1")
        for key in ("first_dense", "shared_ffn", "capacity", "balance_weight", "z_weight", "bias_rate"):
            need(getattr(self, key) >= 0, key, "must be at least 0")
        need(self.scale > 0, "scale", "must be above 0")
        need(self.top_k <= self.experts, "top_k", f"must be at most model.moe.experts = {self.experts}")
        need(self.experts % self.groups == 0, "groups", f"must divide model.moe.experts = {self.experts}")
        need(self.top_groups <= self.groups, "top_groups", f"must be at most model.moe.groups = {self.groups}")
        in_groups = self.top_groups * (self.experts // self.groups)
        need(self.top_k <= in_groups, "top_k", f"the {self.top_groups} best groups have {in_groups} experts")
        per_group = self.experts // self.groups
        need(self.group_score == "max" or per_group > 1, "group_score", "needs groups of at least 2 experts")
        need(not self.shared_gate or self.shared_ffn > 0, "shared_gate", "needs model.moe.shared_ffn")
        if self.choice == "expert":
            for key in ("capacity", "bias"):
                need(not getattr(self, key), key, 'has no meaning where model.moe.choice = "expert"')
            need(self.groups == 1, "groups", 'has no meaning where model.moe.choice = "expert"')
            need(self.balance == "none", "balance", 'experts that choose are balanced; set "none"')

    def sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        after = layer - self.first_dense
        return after >= 0 and after % self.every == self.every - 1

    def rows(self, seq_len: int, capacity: float) -> int:
        """Rows an expert takes of a sequence at most."""
        return int(capacity * self.top_k * seq_len / self.experts)

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where sequences are too short for an expert to take any token."""
        limit = self.capacity if self.choice == "token" else 1.0
        if limit and self.rows(seq_len, limit) < 1:
            key = f"capacity = {self.capacity}" if self.choice == "token" else 'choice = "expert"'
            least = self.experts / (self.top_k * seq_len)
            raise ValueError(
                f"model.moe.{key} drops every token: {limit} x {seq_len} tokens x top_k {self.top_k} / "
                f"{self.experts} experts is less than one row; set model.moe.capacity to {least:.4g} or more, or 0 to "
                "drop none"
            )


class Routes(NamedTuple):
    """Rows to compute, sorted by expert. token [N]: its number among T; weight [N]; counts [E]. slots [T, K]: where a
    token's rows stand, N for one that was dropped; None where experts choose."""

    token: Tensor
    weight: Tensor
    counts: Tensor
    slots: Tensor | None


class RouterLinear(nn.Linear):
    """hidden [..., H] -> logits [..., E] in the router's precision, whatever autocast says."""

    def __init__(self, hidden: int, experts: int, precision: str):
        super().__init__(hidden, experts, bias=False)
        self.dtype = torch.float64 if precision == "fp64" else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class Seen(NamedTuple):
    """What a router did, summed over tokens, as one fp64 vector: rows an expert got [E], then these four."""

    entropy: Tensor  # of scores that sum to 1, in nats
    dropped: Tensor  # rows
    balance: Tensor  # losses, with their weights
    z: Tensor


class Routing(nn.Module):
    """logits [B, S, E] -> routes. Adds the balancing losses to what is differentiated, on the way back through weights.

    `bias` [E] is part of the model where the config asks for one. The step's owner calls `begin` before each step's
    backward and `settle` after its update; `seen` holds what went through backward since `begin`, as in `Seen`.
    """

    bias: Tensor | None

    def __init__(self, cfg: MoE):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("bias", torch.empty(cfg.experts) if cfg.bias else None)
        self.share: Tensor | float = 1.0  # of a sum over tokens in what is differentiated
        self.seen: Tensor | None = None
        self.load: Tensor | None = None  # [E], of the last step's global batch, in sum 1; None before the first
        # [B, s, ...] -> the same of all parts of these sequences [n, B, s, ...], and which is this one.
        self.gather: Callable[[Tensor], tuple[Tensor, int]] = lambda t: (t[None], 0)

    def begin(self, share: Tensor | float) -> None:
        """share: of a sum over tokens in the loss that is differentiated: 1 / tokens of the global batch."""
        self.share, self.seen = share, None

    @torch.no_grad()
    def settle(self, rows: Tensor) -> None:
        """rows [E]: of the global batch. Moves the bias towards an even load; keeps the load for the next step."""
        rows = rows.double()
        if self.bias is not None:
            self.bias += self.cfg.bias_rate * torch.sign(rows.mean() - rows).to(self.bias)
        self.load = rows / rows.sum().clamp(min=1)

    def forward(self, logits: Tensor) -> Routes:
        cfg = self.cfg
        softmax = cfg.scores == "softmax"
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        shares = scores if softmax else scores / scores.sum(-1, keepdim=True)
        routes, chosen = self._by_expert(scores) if cfg.choice == "expert" else self._by_token(scores)
        with torch.no_grad():
            tokens = logits.shape[0] * logits.shape[1]
            dropped = tokens * cfg.top_k - routes.counts.sum() if cfg.capacity else routes.counts.new_zeros(())
            entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
        balance = cfg.balance_weight * self._balance(shares, chosen)
        z = cfg.z_weight * logits.logsumexp(-1).square().sum() if cfg.z_weight else logits.new_zeros(())
        values = torch.stack([value.detach().double() for value in (entropy, dropped, balance, z)])
        seen = torch.cat([routes.counts.double(), values])
        return routes._replace(weight=_Attach.apply(routes.weight, balance + z, seen, self))

    def _by_token(self, scores: Tensor) -> tuple[Routes, Tensor]:
        """Routes, and the experts chosen [B, S, K] before any is dropped."""
        cfg = self.cfg
        for_choice = scores.detach() if self.bias is None else scores.detach() + self.bias.to(scores)
        if cfg.top_groups < cfg.groups:
            for_choice = _best_groups(for_choice, cfg)
        chosen = for_choice.topk(cfg.top_k, dim=-1).indices
        weight = scores.gather(-1, chosen)
        if cfg.normalize:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        expert = chosen
        if cfg.capacity:
            expert = torch.where(self._kept(scores.detach(), chosen), chosen, cfg.experts)
        return _sort(expert.flatten(0, 1), (weight * cfg.scale).flatten(0, 1), cfg.experts), chosen

    def _kept(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """[B, S, K]: whether a token is among those that score highest at the expert it chose, as many as fit."""
        cfg = self.cfg
        asked = torch.full_like(scores, -torch.inf).scatter(-1, chosen, scores.gather(-1, chosen))
        return self._highest(asked, cfg.capacity).gather(-1, chosen)

    def _highest(self, scores: Tensor, capacity: float) -> Tensor:
        """[B, S, E]: whether a token is among its sequence's best at an expert, those with a score of -inf never."""
        parts, own = self.gather(scores)
        whole = parts.transpose(0, 1).flatten(1, 2)
        rows = min(self.cfg.rows(whole.shape[1], capacity), whole.shape[1])
        best = torch.zeros_like(whole, dtype=torch.bool).scatter(1, whole.topk(rows, dim=1).indices, True)
        return (best & (whole > -torch.inf)).unflatten(1, (len(parts), -1))[:, own]

    def _by_expert(self, scores: Tensor) -> tuple[Routes, Tensor]:
        """Zhou et al. 2022 (arXiv:2202.09368): weights are the scores as they are."""
        taken = self._highest(scores.detach(), 1.0)
        expert, token = taken.flatten(0, 1).t().nonzero(as_tuple=True)
        weight = scores.flatten(0, 1)[token, expert] * self.cfg.scale
        return Routes(token, weight, torch.bincount(expert, minlength=self.cfg.experts), None), expert

    def _balance(self, shares: Tensor, chosen: Tensor) -> Tensor:
        """E * sum of f * p over experts, over tokens."""
        cfg = self.cfg
        if cfg.balance == "none" or not cfg.balance_weight:
            return shares.new_zeros(())
        if cfg.balance == "global":
            load = torch.full_like(shares[0, 0], 1 / cfg.experts) if self.load is None else self.load.to(shares)
            return cfg.experts * (shares.sum((0, 1)) * load).sum()
        rows = torch.zeros(len(chosen), cfg.experts, dtype=torch.int64, device=shares.device)
        rows = self.gather(rows.scatter_add(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1))))[0].sum(0)
        if cfg.balance == "micro_batch":
            rows = rows.sum(0, keepdim=True)
        load = rows.to(shares) / rows.sum(-1, keepdim=True)
        return cfg.experts * (shares.sum(1) * load).sum()


class _Attach(torch.autograd.Function):
    """weight as it is; in backward the loss beside it gets its share, and what was seen is noted, once a micro-batch
    however often forward is computed again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, loss: Tensor, seen: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(seen)
        ctx.routing, ctx.dtype = routing, loss.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (seen,) = ctx.saved_tensors
        routing: Routing = ctx.routing
        routing.seen = seen if routing.seen is None else routing.seen + seen
        share = torch.as_tensor(routing.share, dtype=ctx.dtype, device=grads[0].device)
        return grads[0], share, None, None


def _best_groups(scores: Tensor, cfg: MoE) -> Tensor:
    """Scores of experts outside of a token's best groups become -inf (DeepSeek-V2 and V3)."""
    grouped = scores.unflatten(-1, (cfg.groups, -1))
    of_group = grouped.amax(-1) if cfg.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = of_group.topk(cfg.top_groups, dim=-1).indices
    outside = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)


def _sort(expert: Tensor, weight: Tensor, experts: int) -> Routes:
    """expert [T, K], `experts` for none; weight [T, K]."""
    flat = expert.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    slots = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    if len(counts) > experts:  # rows of no expert, sorted to the end
        order = order[: len(order) - int(counts[experts])]
        slots, counts = slots.clamp(max=len(order)), counts[:experts]
    return Routes(order // expert.shape[1], weight, counts, slots.view_as(expert))


class MixtureOfExperts(nn.Module):
    """x [B, S, H] -> [B, S, H]."""

    def __init__(self, cfg: MoE, hidden: int, activation: Activation):
        super().__init__()
        self.router = RouterLinear(hidden, cfg.experts, cfg.precision)
        self.routing = Routing(cfg)
        self.experts = Experts(cfg.experts, hidden, cfg.ffn, activation)
        self.shared = GatedMLP(hidden, cfg.shared_ffn, activation, bias=False) if cfg.shared_ffn else None
        self.shared_gate = nn.Linear(hidden, 1, bias=False) if cfg.shared_gate else None

    @torch.compiler.disable  # how many rows an expert gets is known at run time
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).to(product_dtype(x))  # before rows are repeated and sent
        token, weight, counts, slots = cast(Routes, self.routing(self.router(x)))
        if slots is None:
            rows = self.experts(flat.index_select(0, token), counts)
            out = torch.zeros_like(flat, dtype=rows.dtype).index_add(0, token, rows * weight.to(rows.dtype)[:, None])
        else:
            out = combine(self.experts(dispatch(flat, token, slots), counts), weight, token, slots)
        out = out.view_as(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())

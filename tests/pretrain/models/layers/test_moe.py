"""The mixture-of-experts layer against formulas written out token by token."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.models.layers.experts import Experts, grouped, loop
from pretrain.models.layers.moe import MixtureOfExperts, MoE, Routing

B, S, H, F, E, K = 3, 20, 16, 12, 8, 2


def layer(seed: int = 0, **options) -> MixtureOfExperts:
    module = MixtureOfExperts(MoE(**{"experts": E, "top_k": K, "ffn": F, **options}), H, "silu").double()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.normal_(0, 0.3, generator=generator)
    return module


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(B, S, H, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def one_expert(module: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    gate, up, down = (weight[expert] for weight in module.experts.weights())
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"scores": "sigmoid", "scale": 2.5, "bias": True},
        {"scores": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2", "bias": True},
        {"groups": 4, "top_groups": 1},
        {"shared_ffn": 10},
        {"shared_ffn": 10, "shared_gate": True, "precision": "fp64"},
    ],
    ids=str,
)
def test_equals_a_loop_over_tokens(options):
    module, x = layer(**options), inputs()
    cfg = module.routing.cfg
    out = module(x)
    for b in range(B):
        for s in range(S):
            logits = module.router.weight @ x[b, s]
            scores = logits.softmax(0) if cfg.scores == "softmax" else logits.sigmoid()
            wanted = scores if module.routing.bias is None else scores + module.routing.bias
            groups = wanted.view(cfg.groups, -1)
            best = groups.max(1).values if cfg.group_score == "max" else groups.sort(1).values[:, -2:].sum(1)
            allowed = best.argsort(descending=True)[: cfg.top_groups]
            order = [e for e in wanted.argsort(descending=True).tolist() if e // (E // cfg.groups) in allowed]
            chosen = order[:K]
            weight = scores[chosen] / (scores[chosen].sum() if cfg.normalize else 1.0) * cfg.scale
            expected = sum(w * one_expert(module, e, x[b, s]) for w, e in zip(weight, chosen, strict=True))
            if module.shared is not None:
                shared = module.shared(x[b, s])
                expected = expected + (
                    shared if module.shared_gate is None else shared * module.shared_gate(x[b, s]).sigmoid()
                )
            torch.testing.assert_close(out[b, s], expected, rtol=1e-10, atol=1e-12)


COUNTS = [[8] * 4, [0, 0, 24, 0], [1, 40, 3, 4], [17, 16, 2, 31], [0, 0, 0, 0], [7]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_in_one_kernel_equal_one_expert_after_the_other(counts):
    module = Experts(len(counts), H, F, "gelu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    found = {}
    for compute in (loop, grouped):
        x = torch.linspace(-1, 1, sum(counts) * H).view(-1, H).requires_grad_()
        module.zero_grad()
        out = compute(x, torch.tensor(counts), module.weights(), module.activation)
        (out * out.detach().cos()).sum().backward()
        found[compute] = [out, x.grad, *(p.grad for p in module.parameters())]
    for ours, expected in zip(found[grouped], found[loop], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def balance_of(module: MixtureOfExperts, x: Tensor, load: Tensor) -> Tensor:
    """E * sum of load * score over experts and tokens; load [B, E]."""
    scores = (x @ module.router.weight.T).softmax(-1)
    return E * (scores * load[:, None]).sum()


@pytest.mark.parametrize("balance", ["sequence", "micro_batch", "global"])
def test_the_balancing_losses_reach_the_router_with_their_share(balance):
    module, x = layer(balance=balance, balance_weight=0.3, z_weight=0.2), inputs()
    rows = torch.zeros(B, E, dtype=torch.double)
    chosen = (x @ module.router.weight.T).topk(K, -1).indices
    for b in range(B):
        rows[b] = torch.bincount(chosen[b].flatten(), minlength=E)
    last = torch.arange(1.0, E + 1, dtype=torch.double) / 36
    load = {
        "sequence": rows / (K * S),
        "micro_batch": rows.sum(0).expand(B, E) / (B * K * S),
        "global": last.expand(B, E),
    }
    module.routing.load = last
    logits = x.detach() @ module.router.weight.T
    expected = 0.3 * balance_of(module, x.detach(), load[balance]) + 0.2 * logits.logsumexp(-1).square().sum()
    (wanted,) = torch.autograd.grad(0.25 * expected, module.router.weight)
    module.routing.begin(0.25)
    (plain,) = torch.autograd.grad(without_losses(module, x.detach()).square().sum(), module.router.weight)
    module(x.detach()).square().sum().backward()
    torch.testing.assert_close(module.router.weight.grad - plain, wanted, rtol=1e-9, atol=1e-12)
    entropy, dropped, of_balance, of_z = module.routing.seen[E:]
    torch.testing.assert_close(of_balance + of_z, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(module.routing.seen[:E], rows.sum(0))
    scores = logits.softmax(-1)
    torch.testing.assert_close(entropy, -(scores * scores.log()).sum().detach())
    assert dropped == 0


def without_losses(module: MixtureOfExperts, x: Tensor) -> Tensor:
    other = MixtureOfExperts(MoE(experts=E, top_k=K, ffn=F, balance="none"), H, "silu").double()
    other.load_state_dict(module.state_dict())
    other.router.weight = module.router.weight
    return other(x)


def test_a_recomputed_layer_is_counted_once():
    module, x = layer(balance="sequence"), inputs()
    module.routing.begin(1.0)
    module(x).sum().backward()
    once = module.routing.seen.clone()
    module.routing.begin(1.0)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert torch.equal(module.routing.seen, once)
    with torch.no_grad():
        module(x)
    assert torch.equal(module.routing.seen, once)


def test_the_bias_moves_towards_the_idle_experts_and_only_chooses():
    module, x = layer(bias=True, bias_rate=0.5, balance="none"), inputs()
    module.routing.bias.zero_()
    before = module(x)
    module.routing.bias += 1.0  # of all alike: nothing changes
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)
    module.routing.bias.zero_()
    module.routing.settle(torch.tensor([10, 0, 5, 5, 5, 5, 5, 5]))
    assert module.routing.bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    module.routing.bias[3] = 100.0
    module.routing.begin(1.0)
    module(x).sum().backward()
    assert module.routing.seen[3] == B * S  # chosen by every token
    assert module.routing.bias.grad is None


def test_a_capacity_keeps_the_highest_scores_of_each_sequence():
    module, x = layer(capacity=0.5, balance="none"), inputs()
    limit = int(0.5 * K * S / E)
    scores = (x @ module.router.weight.T).softmax(-1)
    chosen = scores.topk(K, -1).indices
    out = module(x)
    for b in range(B):
        for e in range(E):
            asking = [s for s in range(S) if e in chosen[b, s]]
            taken = sorted(asking, key=lambda s, b=b, e=e: -scores[b, s, e].item())[:limit]
            scores[b, [s for s in asking if s not in taken], e] *= 0
    for b in range(B):
        for s in range(S):
            own = scores[b, s, chosen[b, s]]
            full = (x[b, s] @ module.router.weight.T).softmax(-1)[chosen[b, s]].sum()
            expected = sum(w / full * one_expert(module, e, x[b, s]) for w, e in zip(own, chosen[b, s], strict=True))
            torch.testing.assert_close(out[b, s], expected, rtol=1e-9, atol=1e-12)
    wide = layer(capacity=float(E), balance="none")
    torch.testing.assert_close(wide(x), layer(balance="none")(x), rtol=0, atol=0)


def test_experts_that_choose_take_as_many_rows_each():
    module, x = layer(choice="expert", balance="none"), inputs()
    scores = (x @ module.router.weight.T).softmax(-1)
    expected = torch.zeros_like(x)
    rows = K * S // E
    for b in range(B):
        for e in range(E):
            for s in scores[b, :, e].topk(rows).indices:
                expected[b, s] += scores[b, s, e] * one_expert(module, e, x[b, s])
    module.routing.begin(1.0)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    out.sum().backward()
    assert module.routing.seen[:E].tolist() == [B * rows] * E


def test_the_router_computes_in_fp32_under_autocast():
    module = MixtureOfExperts(MoE(experts=E, top_k=K, ffn=F), H, "silu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module.router(torch.randn(2, 3, H, dtype=torch.bfloat16))
        assert logits.dtype == torch.float32
        assert module(torch.randn(2, 3, H)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "model.moe.top_k = 9: must be at most model.moe.experts = 8"),
        ({"experts": 0}, "model.moe.experts = 0: must be at least 1"),
        ({"groups": 3}, "model.moe.groups = 3: must divide model.moe.experts = 8"),
        ({"groups": 4, "top_groups": 5}, "model.moe.top_groups = 5: must be at most model.moe.groups = 4"),
        ({"groups": 8, "top_k": 2}, "model.moe.top_k = 2: the 1 best groups have 1 experts"),
        ({"groups": 8, "top_groups": 8, "group_score": "top2"}, "model.moe.group_score = top2: needs groups of at"),
        ({"capacity": -1.0}, "model.moe.capacity = -1.0: must be at least 0"),
        ({"shared_gate": True}, "model.moe.shared_gate = True: needs model.moe.shared_ffn"),
        ({"choice": "expert"}, "model.moe.balance = global: experts that choose are balanced"),
        ({"choice": "expert", "balance": "none", "bias": True}, "model.moe.bias = True: has no meaning where"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(**{"experts": E, **options})


def test_a_capacity_that_drops_everything():
    with pytest.raises(
        ValueError, match=r"model.moe.capacity = 0.1 drops every token: .* set model.moe.capacity to 0.2 "
    ):
        MoE(experts=E, top_k=K, capacity=0.1).check_length(20)
    MoE(experts=E, top_k=K, capacity=0.2).check_length(20)
    with pytest.raises(ValueError, match='choice = "expert" drops every token'):
        MoE(experts=E, top_k=1, choice="expert", balance="none").check_length(4)


def test_routing_needs_no_owner():
    """A model outside of an engine: a sum is differentiated, its routers' losses join it as they are."""
    assert Routing(MoE()).share == 1.0

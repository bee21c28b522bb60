"""What experts are made of, against plain arithmetic and the real layer."""

import itertools

import pytest
import torch
from torch import Tensor

from checkpoints.surgery.experts import largest
from checkpoints.surgery.methods import PARTITIONS, Mixing, balanced, copies, noisy_copies, parts
from pretrain.models.layers.mlp import GatedMLP
from pretrain.models.layers.moe import MixtureOfExperts, MoE

HIDDEN, FFN, EXPERTS = 6, 24, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_layer() -> GatedMLP:
    torch.manual_seed(3)
    return GatedMLP(HIDDEN, FFN, "silu", bias=False).double().requires_grad_(False)


@pytest.mark.parametrize("method", PARTITIONS)
def test_parts_add_up_to_the_dense_layer(method):
    dense = dense_layer()
    order = PARTITIONS[method](dense.gate.weight, dense.up.weight, EXPERTS, seeded())
    assert order.sort().values.tolist() == list(range(FFN))
    gate, up = (parts(layer.weight, order, EXPERTS, 0) for layer in (dense.gate, dense.up))
    down = parts(dense.down.weight, order, EXPERTS, 1)
    assert gate.shape == (EXPERTS, FFN // EXPERTS, HIDDEN) and down.shape == (EXPERTS, HIDDEN, FFN // EXPERTS)
    x = torch.randn(5, HIDDEN, dtype=torch.float64, generator=seeded())
    out = sum(dense.activation(x @ g.t()) * (x @ u.t()) @ d.t() for g, u, d in zip(gate, up, down, strict=True))
    torch.testing.assert_close(out, dense(x), rtol=1e-12, atol=1e-14)
    again = PARTITIONS[method](dense.gate.weight, dense.up.weight, EXPERTS, seeded())
    assert torch.equal(order, again)


def test_clustering_finds_units_that_read_alike():
    kinds = torch.arange(FFN)[torch.randperm(FFN, generator=seeded(1))] % EXPERTS
    centres = torch.randn(EXPERTS, 2 * HIDDEN, generator=seeded(2))
    rows = centres[kinds] + 0.05 * torch.randn(FFN, 2 * HIDDEN, generator=seeded(3))
    rows *= torch.rand(FFN, 1, generator=seeded(4)) + 0.1  # length says nothing
    order = PARTITIONS["clustering"](rows[:, :HIDDEN], rows[:, HIDDEN:], EXPERTS, seeded(5))
    found = [set(kinds[own].tolist()) for own in order.view(EXPERTS, -1)]
    assert sorted(found, key=min) == [{kind} for kind in range(EXPERTS)]


def test_clusters_are_equally_full_and_take_their_nearest():
    distance = torch.tensor([[0.1, 9.0], [0.2, 1.0], [0.3, 0.4], [0.15, 5.0]])
    assert balanced(distance).tolist() == [0, 1, 1, 0]  # all want cluster 0; the two nearest get in


def test_clustering_of_equal_units_ends():
    same = torch.ones(FFN, HIDDEN)
    order = PARTITIONS["clustering"](same, same, EXPERTS, seeded())
    assert order.sort().values.tolist() == list(range(FFN))


def test_noise_has_its_size_and_share_and_differs_by_expert():
    dense = 3.0 * torch.randn(200, 100, generator=seeded())
    found = noisy_copies(dense, 3, 0.1, 0.25, seeded(1))
    noise = found - dense
    touched = noise != 0
    for expert in range(3):
        assert float(touched[expert].float().mean()) == pytest.approx(0.25, abs=0.02)
        assert float(noise[expert][touched[expert]].std()) == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(found, noisy_copies(dense, 3, 0.1, 0.25, seeded(1)))
    assert noisy_copies(dense.bfloat16(), 2, 0.1, 1.0, seeded()).dtype == torch.bfloat16


def sparse_layer(dense: GatedMLP, moe: MoE, method: str, zero_router: bool) -> MixtureOfExperts:
    layer = MixtureOfExperts(moe, HIDDEN, "silu").double()
    weights = (dense.gate.weight, dense.up.weight, dense.down.weight)
    order = torch.randperm(FFN, generator=seeded())

    def make(weight: Tensor, dim: int) -> Tensor:
        return copies(weight, EXPERTS) if method == "copy" else parts(weight, order, EXPERTS, dim)

    with torch.no_grad():
        for target, weight, dim in zip(layer.experts.weights(), weights, (0, 0, 1), strict=True):
            target.copy_(make(weight, dim))
        layer.router.weight.zero_() if zero_router else layer.router.weight.normal_(0.0, 0.5, generator=seeded())
    return layer


@pytest.mark.parametrize(
    ("method", "scores", "normalize", "top_k", "zero_router", "choice", "capacity"),
    [
        *itertools.product(
            ("copy", "random"), ("softmax", "sigmoid"), (True, False), (2, EXPERTS), (True, False), ("token",), (0.0,)
        ),
        ("copy", "softmax", True, 2, False, "token", 0.5),
        ("random", "softmax", True, EXPERTS, True, "token", 0.5),
        ("copy", "softmax", True, 2, False, "expert", 0.0),
        ("random", "softmax", True, EXPERTS, True, "expert", 0.0),
    ],
)
def test_what_is_said_to_be_exact_is_and_nothing_else(method, scores, normalize, top_k, zero_router, choice, capacity):
    ffn = FFN if method == "copy" else FFN // EXPERTS
    by_token = choice == "token"
    mixing = Mixing(
        experts=EXPERTS,
        top_k=top_k,
        softmax=scores == "softmax",
        normalized=normalize and by_token,
        whole=not capacity and (by_token or top_k == EXPERTS),
        zero_router=zero_router,
    )
    scale = mixing.scale(method)
    moe = MoE(
        EXPERTS, top_k, ffn, scores=scores, normalize=normalize, scale=scale, choice=choice, capacity=capacity,
        balance="none", precision="fp64",
    )  # fmt: skip
    dense = dense_layer()
    x = torch.randn(2, 8, HIDDEN, dtype=torch.float64, generator=seeded(7))
    with torch.no_grad():
        off = float((sparse_layer(dense, moe, method, zero_router)(x) - dense(x)).abs().max())
    if mixing.loss_of(method, False, scale):
        assert off > 1e-4
    else:
        assert off < 1e-12
    assert mixing.loss_of(method, True, scale) == "noise was added to the copies"
    assert mixing.loss_of(method, False, 1.5 * scale)


def test_the_most_used_experts_of_each_group_stay():
    usage = torch.tensor([5.0, 9.0, 7.0, 8.0, 0.0, 1.0, 1.0, 0.5])
    assert largest(usage, 4) == [0, 1, 2, 3]
    assert largest(usage, 4, groups=2) == [1, 3, 5, 6]
    assert largest(usage, 2, groups=2) == [1, 5]  # among equals the first

"""Merging methods against the formulas of their papers, written out over whole stacks of tensors."""

import math

import pytest
import torch
from torch import Tensor

from checkpoints.surgery.arithmetic import (
    Products,
    dare,
    mean_shares,
    running_mean,
    slerp,
    task_arithmetic,
    ties,
    trim,
)
from checkpoints.surgery.target import narrowed

SHAPE = (7, 11)


def drawn(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def reads(tensors: list[Tensor]) -> list:
    return [lambda tensor=tensor: tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 0.5, 2], [0, 0, 1], [0, 2, 5]])
def test_the_mean_is_weighted(weights):
    models = drawn(3)
    expected = sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)
    torch.testing.assert_close(running_mean(reads(models), mean_shares(weights)), expected)


def test_the_mean_of_equal_tensors_is_that_tensor_to_the_bit():
    model = drawn(1)[0].float()
    assert torch.equal(running_mean(reads([model] * 3), mean_shares([1, 1, 1])), model)
    assert torch.equal(running_mean(reads([model] * 3), mean_shares([0.3, 0.1, 7])), model)


def test_an_exponential_average_forgets_the_oldest():
    models, decay = drawn(4), 0.7
    expected = models[0]
    for model in models[1:]:
        expected = decay * expected + (1 - decay) * model
    torch.testing.assert_close(running_mean(reads(models), [1 - decay] * 4), expected)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_moves_along_the_arc(t):
    a, b = drawn(2)
    a, b = a / a.norm(), b / b.norm()
    point = slerp(reads([a, b]), t)
    angle = math.acos(float((a * b).sum()))
    assert float(point.norm()) == pytest.approx(1.0)
    assert math.acos(min(1.0, float((a * point).sum()))) == pytest.approx(t * angle, abs=1e-7)
    assert math.acos(min(1.0, float((b * point).sum()))) == pytest.approx((1 - t) * angle, abs=1e-7)


def test_slerp_of_what_has_no_arc_is_a_line():
    (a,) = drawn(1)
    for b in (2 * a, -a, torch.zeros_like(a)):
        torch.testing.assert_close(slerp(reads([a, b]), 0.25), 0.75 * a + 0.25 * b)


def test_task_arithmetic_adds_and_takes_away():
    base, *models = drawn(3)
    found = task_arithmetic(base, reads(models), [1.0, -0.5], 0.4)
    torch.testing.assert_close(found, base + 0.4 * (models[0] - base) - 0.2 * (models[1] - base))
    torch.testing.assert_close(task_arithmetic(base, reads(models[:1]), [1.0], 1.0), models[0])


def test_trimming_keeps_the_largest():
    tau = torch.tensor([[0.1, -5.0, 3.0], [0.0, -2.0, 1.0]])
    assert trim(tau.clone(), 0.5).tolist() == [[0.0, -5.0, 3.0], [0.0, -2.0, 0.0]]
    assert trim(tau.clone(), 0.01).tolist() == [[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]  # at least one
    assert torch.equal(trim(tau.clone(), 1.0), tau)
    assert trim(torch.tensor(3.0), 0.2).item() == 3.0


@pytest.mark.parametrize(("keep", "weights"), [(1.0, [1, 1, 1]), (0.3, [1, 1, 1]), (0.3, [2, 1, 0.5])])
def test_ties_is_the_papers_three_steps(keep, weights):
    base, *models = drawn(4)
    taus = torch.stack([model - base for model in models])
    flat = taus.flatten(1)
    count = round(keep * flat.shape[1])
    edge = flat.abs().sort(dim=1, descending=True).values[:, count - 1]
    taus = (flat * (flat.abs() >= edge[:, None])).view_as(taus)  # trim
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    sign = (w * taus).sum(0).sign()  # elect
    agrees = (taus.sign() == sign) & (taus != 0)
    total, votes = (w * taus * agrees).sum(0), (w * agrees).sum(0)
    expected = base + 0.7 * torch.where(votes > 0, total / votes.clamp(min=1e-9), 0.0)  # disjoint mean
    torch.testing.assert_close(ties(base, reads(models), weights, 0.7, keep), expected)


def test_ties_of_opposite_changes_keeps_the_stronger():
    base = torch.zeros(2)
    models = [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 3.0])]
    assert ties(base, reads(models), [1, 1], 1.0, 1.0).tolist() == [3.0, 2.0]


def test_dare_keeps_the_sum_and_drops_its_share():
    base, model = drawn(2, 300, 200)
    seeded = [torch.Generator().manual_seed(4)]
    tau = dare(base, reads([model]), [1.0], 1.0, 0.75, seeded) - base
    kept = tau.abs() > 1e-9
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(tau[kept], 4 * (model - base)[kept])
    again = [torch.Generator().manual_seed(4)]
    assert torch.equal(tau, dare(base, reads([model]), [1.0], 1.0, 0.75, again) - base)
    torch.testing.assert_close(dare(base, reads([model]), [0.5], 2.0, 0.0, [torch.Generator()]), model)


def test_products_over_pieces_are_those_of_the_whole():
    a, b = (tensor.float() for tensor in drawn(2, 3 << 19))
    found = Products.of(a, b)
    x, y = a.double(), b.double()
    assert found.relative == pytest.approx(float((y - x).norm() / x.norm()))
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(x, y, dim=0)))
    assert found.largest == float((y - x).abs().max())
    zero = torch.zeros(3)
    assert (Products.of(zero, zero).relative, Products.of(zero, zero).cosine) == (0.0, 1.0)
    assert Products.of(zero, torch.ones(3)).relative == math.inf
    assert Products.of(torch.zeros(0, 2), torch.zeros(0, 2)) == Products()
    broken = torch.tensor([1.0, math.nan])
    assert math.isnan((Products.of(broken, broken) + Products.of(zero, zero)).largest)


def test_a_number_too_large_for_the_type_is_named():
    tensor = torch.tensor([1.0, 1e5])
    with pytest.raises(ValueError, match=r"tensor 'w' holds 1e\+05, too large for float16"):
        narrowed("w", tensor, torch.float16)
    assert narrowed("w", tensor, torch.bfloat16).dtype == torch.bfloat16
    already = torch.tensor([math.inf, math.nan, 1.0])
    assert narrowed("w", already, torch.float16).isinf().sum() == 1  # nothing of ours to report

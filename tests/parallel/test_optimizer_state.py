"""Optimizer state as flat tensors: names, laziness, what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.optimizer_state import load_optimizer_state, optimizer_state, set_lr


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)


def test_names_and_values_are_the_live_state() -> None:
    model = nn.Linear(3, 2)
    optimizer = adamw(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer, model.named_parameters())
    assert set(state) == {f"{kind}.{p}" for kind in ("exp_avg", "exp_avg_sq", "step") for p in ("weight", "bias")}
    assert state["step.bias"] == 1
    torch.testing.assert_close(state["exp_avg.weight"], torch.full((2, 3), 0.1))
    state["exp_avg.weight"].zero_()
    assert not optimizer.state[model.weight]["exp_avg"].any()


def test_making_lazy_state_changes_nothing_else_and_equals_a_fresh_start() -> None:
    model = nn.Linear(3, 2)
    optimizer = adamw(model)
    model(torch.ones(1, 3)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    state = optimizer_state(optimizer, model.named_parameters())
    assert not any(value.any() for value in state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.5)
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before[1] * 0.95 - 0.1)


def test_parameters_that_missed_a_step_get_state_without_touching_the_others() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    optimizer = adamw(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer, model.named_parameters())
    assert (state["step.used.weight"], state["step.idle.weight"]) == (1, 0)


def test_a_tied_parameter_is_saved_once_and_sgd_without_state_gives_none() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2, bias=False)
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 2
    assert {key.rpartition(".")[0] for key in optimizer_state(adamw(model), named)} == {
        "exp_avg.a",
        "exp_avg_sq.a",
        "step.a",
    }
    assert optimizer_state(torch.optim.SGD(model.parameters(), lr=1.0), named) == {}


def broken(change: str) -> dict[str, Tensor]:
    model = nn.Linear(3, 2)
    tensors = dict(optimizer_state(adamw(model), model.named_parameters()))
    if change == "missing":
        del tensors["exp_avg.bias"]
    elif change == "unknown":
        tensors["momentum_buffer.weight"] = torch.zeros(2, 3)
    elif change == "shape":
        tensors["exp_avg.weight"] = torch.zeros(3, 2)
    else:
        tensors["exp_avg.weight"] = torch.zeros(2, 3, dtype=torch.bfloat16)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 tensors missing \['exp_avg.bias'\]"),
        ("unknown", r"1 unknown \['momentum_buffer.weight'\]"),
        ("shape", r"'exp_avg.weight' is \[3, 2\]"),
        ("dtype", "torch.bfloat16, expected .* torch.float32"),
    ],
)
def test_state_that_does_not_fit_is_refused_before_anything_is_written(change: str, message: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = adamw(model)
    tensors = {key: torch.ones_like(value) for key, value in broken(change).items()}
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(optimizer, model.named_parameters(), tensors)
    assert not any(value.any() for value in optimizer_state(optimizer, model.named_parameters()).values())


def test_parameters_without_a_name_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"1 of the optimizer's parameters have no name, the first of shape \[2\]"):
        optimizer_state(adamw(model), [("weight", model.weight)])


def test_set_lr_without_ratios_sets_it_everywhere() -> None:
    model = nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr_ratio": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]

"""AdamW and Muon: who is decayed, who is orthogonalised, and that sharding changes nothing."""

import copy
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.optimizer_state import load_optimizer_state, optimizer_state, set_lr
from pretrain.optim import OptimConfig, build_optimizer, orthogonalise
from tests.ranks import run_ranks

Name = Literal["adamw", "muon"]
NAMES: tuple[Name, ...] = ("adamw", "muon")


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; one matrix wide, one tall, two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleDict(
            {
                "0": nn.Linear(6, 9),
                "1": nn.Linear(9, 6, bias=False),
                "2": nn.Linear(6, 9, bias=False),
                "3": nn.Linear(9, 6, bias=False),
            }
        )
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def batch(step: int) -> Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_lr(optimizer, 0.01 / (step + 1))
        tokens = batch(step)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_are_decayed(name: Name) -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in model.named_parameters():
        expected = 1.0 - 0.1 * 0.5 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p, torch.full_like(p, expected), msg=key)


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    model = net()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name="muon"))
    state = optimizer_state(optimizer, model.named_parameters())
    muon = {name.removeprefix("momentum_buffer.") for name in state if name.startswith("momentum_buffer.")}
    assert muon == {f"layers.{i}.weight" for i in range(4)}
    adamw = {name.removeprefix("exp_avg.") for name in state if name.startswith("exp_avg.")}
    assert adamw == {"embed.weight", "head.weight", "norm.weight", "norm.bias", "layers.0.bias"}


def test_muon_first_step_is_the_orthogonalised_gradient_as_large_as_adamws() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    config = OptimConfig(name="muon", lr=0.5, weight_decay=0.0, muon_nesterov=False, muon_precision="fp32")
    optimizer = build_optimizer([("w", weight)], config)
    weight.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(weight.grad, full_matrices=False)
    optimizer.step()
    update = -weight.detach() / (0.5 * 0.2 * 40**0.5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.3
    in_basis = u.mT @ update @ vh.mT
    torch.testing.assert_close(in_basis, torch.diag(in_basis.diagonal()), atol=1e-4, rtol=0)
    assert -weight.detach().std() / 0.5 == pytest.approx(-0.2, rel=0.2)


def test_nesterov_and_momentum_follow_their_definition() -> None:
    gradients = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    for nesterov in (True, False):
        weight = nn.Parameter(torch.zeros(5, 7))
        config = OptimConfig(
            name="muon", lr=1.0, weight_decay=0, muon_momentum=0.8, muon_nesterov=nesterov, muon_precision="fp32"
        )
        optimizer = build_optimizer([("w", weight)], config)
        for gradient in gradients:
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
        average = 0.2 * (0.8 * gradients[0] + gradients[1])
        direction = 0.2 * gradients[1] + 0.8 * average if nesterov else average
        expected = orthogonalise([direction], 5, torch.float32)[0] * 0.2 * 7**0.5
        torch.testing.assert_close(before - weight.detach(), expected)


def test_orthogonalise_treats_a_stack_as_separate_matrices() -> None:
    stack = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(2))
    together = orthogonalise([stack], 5, torch.float32)[0]
    torch.testing.assert_close(
        together, torch.stack(orthogonalise(list(stack), 5, torch.float32)), atol=1e-5, rtol=1e-5
    )
    assert not orthogonalise([torch.zeros(3, 4)], 5, torch.float32)[0].any()


def test_bf16_products_are_near_fp32_ones() -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
    low, high = (orthogonalise([matrix], 5, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).norm() < 0.06 * high.norm()


def test_set_lr_keeps_each_groups_ratio() -> None:
    config = OptimConfig(name="muon", lr=1.0, muon_adamw_lr_ratio=0.25)
    optimizer = build_optimizer(net().named_parameters(), config)
    set_lr(optimizer, 0.4)
    assert {(group["use_muon"], group["lr"]) for group in optimizer.param_groups} == {
        (True, 0.4),
        (False, 0.1),
    }


def test_frozen_parameters_are_left_out_and_all_frozen_is_refused() -> None:
    model = net()
    model.embed.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embed.weight) not in held and len(held) == 8
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        build_optimizer(model.named_parameters(), OptimConfig())


@pytest.mark.parametrize(
    "bad", [{"name": "adam"}, {"betas": (0.9, 1.0)}, {"lr": 0}, {"clip_grad_norm": -1}, {"momentum": 0.9}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        OptimConfig(**bad)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact(name: Name) -> None:
    config = OptimConfig(name=name)
    straight = net()
    train(straight, build_optimizer(straight.named_parameters(), config), range(6))

    stopped = net()
    optimizer = build_optimizer(stopped.named_parameters(), config)
    train(stopped, optimizer, range(3))
    saved = {k: v.clone() for k, v in optimizer_state(optimizer, stopped.named_parameters()).items()}

    resumed = copy.deepcopy(stopped)
    optimizer = build_optimizer(resumed.named_parameters(), config)
    load_optimizer_state(optimizer, resumed.named_parameters(), saved)
    train(resumed, optimizer, range(3, 6))
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[key]), key


def train_sharded(name: Name) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights and optimizer state after 3 steps, gathered: FSDP2, FSDP2 resumed after 2, HSDP."""
    results = []
    world = torch.distributed.get_world_size()
    meshes = [
        init_device_mesh("cpu", (world,)),
        init_device_mesh("cpu", (world, 1), mesh_dim_names=("r", "s")),
    ]
    for mesh, stop in ((meshes[0], 3), (meshes[0], 2), (meshes[1], 3)):
        model = net()
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, muon_precision="fp32"))
        train(model, optimizer, range(stop))
        if stop < 3:
            saved = {
                key: whole(value).clone() for key, value in optimizer_state(optimizer, model.named_parameters()).items()
            }
            optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, muon_precision="fp32"))
            load_optimizer_state(optimizer, model.named_parameters(), saved)
            train(model, optimizer, range(stop, 3))
        state = optimizer_state(optimizer, model.named_parameters())
        results.append((weights(model), {key: whole(value).clone() for key, value in state.items()}))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sharded_equals_one_process(name: Name) -> None:
    model = net()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, muon_precision="fp32"))
    train(model, optimizer, range(3))
    state = optimizer_state(optimizer, model.named_parameters())
    for rank_results in run_ranks(train_sharded, 2, name):
        plain, resumed, hybrid = rank_results
        for key, value in weights(model).items():
            torch.testing.assert_close(plain[0][key], value, atol=1e-6, rtol=0, msg=key)
            torch.testing.assert_close(hybrid[0][key], value, atol=1e-6, rtol=0, msg=key)
            assert torch.equal(plain[0][key], resumed[0][key]), key
        for key, value in state.items():
            torch.testing.assert_close(plain[1][key], value, atol=1e-6, rtol=1e-5, msg=key)
            assert torch.equal(plain[1][key], resumed[1][key]), key


def orthogonalise_layouts() -> float:
    """Largest difference to the whole matrices over placements on a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(7, 5, generator=generator) for _ in range(5)]
    expected = orthogonalise(matrices, 5, torch.float32)
    worst = 0.0
    for placements in (
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [Replicate(), Replicate()],
    ):
        cut: list[Tensor] = [distribute_tensor(m, mesh, placements) for m in matrices]
        for one, reference in zip(orthogonalise(cut, 5, torch.float32), expected, strict=True):
            assert isinstance(one, DTensor) and list(one.placements) == placements
            worst = max(worst, (one.full_tensor() - reference).abs().max().item())
    return worst


@pytest.mark.slow
def test_orthogonalise_sees_whole_matrices_under_every_placement() -> None:
    assert max(run_ranks(orthogonalise_layouts, 4)) < 1e-5

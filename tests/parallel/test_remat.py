"""Activation recomputation: same gradients, fewer activations kept, and it compiles."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.remat import apply_remat


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def run(recompute: str) -> tuple[list[torch.Tensor], int, int]:
    """Gradients, bytes kept for backward, and matrix products."""
    torch.manual_seed(0)
    block = Block()
    apply_remat(block, recompute)
    kept: dict[int, int] = {}
    x = torch.randn(4, 8, requires_grad=True)
    parameters = {p.data_ptr() for p in block.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with Products() as products:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block(x).square().sum()
        out.backward()
    return [x.grad, *(p.grad for p in block.parameters())], sum(kept.values()), products.count


def test_gradients_are_the_same_and_only_what_is_cheap_is_computed_again():
    results = {recompute: run(recompute) for recompute in ("none", "selective", "full")}
    for gradients, _, _ in results.values():
        for gradient, expected in zip(gradients, results["none"][0], strict=True):
            assert torch.equal(gradient, expected)
    products = {recompute: count for recompute, (_, _, count) in results.items()}
    assert products["selective"] == products["none"] < products["full"]
    assert results["full"][1] < results["none"][1]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_recomputed_block_compiles_as_one_graph(recompute):
    block, counter = Block(), CompileCounter()
    apply_remat(block, recompute)
    block.compile(backend=counter)
    block(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1

"""Feed-forward layers."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers.linear import fused_linear

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's CLIP's stand-in for gelu."""
    return x * (1.702 * x).sigmoid()


def relu2(x: Tensor) -> Tensor:
    """relu(x) ** 2 (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); with silu this is SwiGLU (Shazeer 2020)."""

    def __init__(self, hidden: int, ffn: int, activation: Activation, bias: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(hidden, ffn, bias=bias)
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, hidden: int, ffn: int, activation: Activation, bias: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

"""Megatron's Transformer Engine linear layers in our layer specs: when they are taken, and that they fit.

Neither Transformer Engine nor a GPU is here. Megatron's own wrappers are, and run on a stand-in of the one class of the
library that they wrap, with the arguments, parameters and communication of `transformer_engine.pytorch.Linear`.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parallel.test_engine_megatron import MIXED, OTHER, _compare, needs_megatron
from tests.parallel.test_engine_megatron_latent import DEEPSEEK
from tests.ranks import run_ranks

LAYERS = ("TEColumnParallelLinear", "TERowParallelLinear")


class StandIn(nn.Module):
    """x [S, B, in] -> [S, B, out]; S whole between a column- and a row-parallel one. See the module."""

    built: list[tuple[str, bool]] = []  # noqa: RUF012  of all: parallel mode, whether experts' communication is off

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
        device: str,
        ub_name: str | None = None,
        rng_tracker_name: str | None = None,
    ):
        from megatron.core.tensor_parallel import mappings

        super().__init__()
        assert not fuse_wgrad_accumulation and return_bias <= bias
        self.mappings, self.mode, self.use_bias, self.return_bias = mappings, parallel_mode, bias, return_bias
        self.group = tp_group if sequence_parallel and tp_size > 1 else None
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        self.bias: Any = torch.empty(0)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = sequence_parallel
        StandIn.built.append((parallel_mode or "none", tp_group is None))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        if self.group is not None and self.mode == "column":
            x = self.mappings.gather_from_sequence_parallel_region(x, group=self.group)
        out = F.linear(x, self.weight)
        if self.group is not None and self.mode == "row":
            out = self.mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


def _wrappers() -> ModuleType:
    """Megatron's module of wrappers, executed anew where the library seems to be installed."""
    library = mock.MagicMock(__version__="2.6.0")
    library.pytorch.Linear = StandIn
    names = {"": library, ".pytorch": library.pytorch, ".pytorch.fp8": library.pytorch.fp8}
    spec = importlib.util.find_spec("megatron.core.extensions.transformer_engine")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {f"transformer_engine{name}": stand for name, stand in names.items()}):
        spec.loader.exec_module(module)
    return module


CASES = {
    (True, True, torch.float32): True,
    (True, True, torch.float64): False,  # which it cannot compute
    (True, False, torch.float32): False,
    (False, True, torch.float32): False,
}
Found = tuple[list[bool], list[dict[str, float]], list[tuple[str, bool]]]


def _look() -> Found:
    """Whether they are taken in each case; distances from the native engine with them; what was built."""
    from parallel.engines import megatron_model as model

    taken = []
    for installed, gpu, dtype in CASES:
        has_gpu = mock.patch.object(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with has_gpu, mock.patch.object(model, "HAVE_TE", installed):
            layers = model.linear_layers(dtype)
        taken.append(layers == tuple(getattr(model, name) for name in LAYERS))
        assert taken[-1] or layers == (model.ColumnParallelLinear, model.RowParallelLinear)
    wrappers = _wrappers()
    assert wrappers.HAVE_TE
    wrapped = tuple(getattr(wrappers, name) for name in LAYERS)
    tp, ep = [["parallel.tp=2"]], [["parallel.ep=2"]]
    with mock.patch.object(model, "linear_layers", lambda _: wrapped):
        distances = _compare([(OTHER, tp), (DEEPSEEK, tp), (MIXED, ep)])
    return taken, distances, StandIn.built


@pytest.fixture(scope="module")
def found() -> Found:
    """Importing Megatron takes longer than all of it: once, and on ranks alone."""
    return run_ranks(_look, 2, timeout=280)[0]


@needs_megatron
@pytest.mark.slow
def test_they_are_taken_where_they_are_installed_and_can_run(found: Found) -> None:
    assert found[0] == list(CASES.values())


@needs_megatron
@pytest.mark.slow
def test_they_fit_our_specs(found: Found) -> None:
    """Numbers, initial weights and so names are those of the native engine."""
    assert {("column", False), ("row", False), ("none", True)} <= set(found[2])
    for distances in found[1]:
        assert distances["initial weights"] == 0 and max(distances.values()) < 2e-5, distances

"""The certifier on mixtures of experts: layouts of 2, 4 and 8 agree, and the bugs of expert parallelism are named."""

import pytest

from launch.commands.verify import Certifier, _rounds
from parallel import expert
from parallel.engines import native
from parallel.layouts import describe_layout
from parallel.mesh import ParallelConfig
from parallel.world import World
from pretrain.config import resolve
from pretrain.shrink import shrink
from pretrain.verify import changed
from tests.launch.test_verify_bugs import ALONE, check, nothing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
MODEL = ["train.precision=fp32", "model.heads=8", "model.kv_heads=4", "model.moe.bias=true", "model.moe.bias_rate=0.01"]
MODEL += ["model.moe.first_dense=1", "model.moe.shared_ffn=128"]


def make_certifier(folder, global_batch: int, **options) -> Certifier:
    words = [*MODEL, *(f"model.moe.{key}={value}" for key, value in options.items())]
    small, _ = shrink(resolve("tiny-moe", words)[0], {**ALONE, "pp": 2}, 8)
    small = changed(small, {"train.global_batch": global_batch, "train.micro_batch": 2})
    return Certifier(small, 2, str(folder), timeout=60, device="cpu")


@pytest.fixture(scope="module")
def certifier(tmp_path_factory):
    return make_certifier(tmp_path_factory.mktemp("reference"), 12)


def test_without_a_bug_they_agree(certifier):
    verdict = check(certifier, nothing, dp_shard=2, ep=2)
    assert verdict.agrees, verdict.diagnosis()
    assert max(c.share for c in verdict.comparisons.values()) < 0.5


def expert_gradients_times_ep(world: World) -> None:
    settle = native.settle

    def wrong(parameters) -> None:
        parameters = list(parameters)
        settle(parameters)
        for parameter in parameters:
            if parameter.grad is not None and parameter.ndim == 3:
                parameter.grad *= world.size

    native.settle = wrong


def test_gradients_of_experts_times_ep(certifier):
    lines = check(certifier, expert_gradients_times_ep, dp_shard=2, ep=2).diagnosis()
    assert any("layers.1.moe.experts.gate" in line and "2.0 times" in line for line in lines), lines
    assert any("parallel.ep" in line for line in lines), lines
    assert not any("Every gradient" in line for line in lines), lines


def balance_times_micro_batches(world: World) -> None:
    begin = expert.Routers.begin
    expert.Routers.begin = lambda self, share: begin(self, share * 3)


def test_a_balancing_loss_scaled_by_micro_batches(tmp_path):
    certifier = make_certifier(tmp_path, 12, balance="sequence")
    lines = check(certifier, balance_times_micro_batches, dp_shard=2, ep=2).diagnosis()
    assert "its gradient is off" in lines[0], lines
    assert not any("of step 1" in line for line in lines), lines  # the loss itself is right


def bias_of_own_load(world: World) -> None:
    def settle(self) -> None:
        for routing in self.held.values():
            routing.settle(routing.seen[: routing.cfg.experts])

    expert.Routers.settle = settle


def test_a_bias_that_each_rank_updates_by_its_own_load(certifier):
    lines = check(certifier, bias_of_own_load, dp_shard=2, ep=2).diagnosis()
    assert any("moe.routing.bias" in line for line in lines), lines


LAYOUTS = [
    {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
    {"dp_shard": 4, "tp": 2, "ep": 2, "expert_tp": False},
    {"pp": 2, "dp_shard": 2, "cp": 2, "ep": 4, "schedule": "zbvzerobubble"},
    {"dp_replicate": 2, "dp_shard": 4, "ep": 4},
    {"dp_shard": 8, "ep": 8},
    {"dp_shard": 8, "ep": 2},
    {"dp_shard": 4, "cp": 2, "ep": 8},
    {"dp_shard": 4, "tp": 2, "ep": 4},
    {"dp_shard": 2, "tp": 4, "ep": 2},
    {"pp": 2, "dp_shard": 4, "ep": 2},
    {"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2, "schedule": "interleaved1f1b"},
    {"cp": 4, "tp": 2, "ep": 4, "cp_method": "ring"},
]


@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        ({}, LAYOUTS),
        ({"shared_ffn": 0, "balance": "sequence", "capacity": 1.5}, LAYOUTS[:3]),
        ({"scores": "sigmoid", "groups": 2, "shared_gate": "true"}, LAYOUTS[1:4]),
    ],
    ids=["shared", "alone", "groups"],
)
def test_layouts_of_eight(options, layouts, tmp_path):
    certifier = make_certifier(tmp_path, 32, **options)
    for degrees in layouts:
        parallel = ParallelConfig(**{**ALONE, **degrees})
        verdict = certifier.verify(parallel, {"adamw": _rounds(certifier.config, parallel)["adamw"]})
        assert verdict.agrees, (describe_layout(parallel), verdict.refused, verdict.diagnosis())

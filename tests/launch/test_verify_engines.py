"""pretrain verify-layout with engines other than torch: certified against the same one-process reference."""

import importlib.util
from functools import partial

import pytest

from launch.cli import main
from launch.commands.verify import Certifier
from parallel.world import World
from tests.launch.test_verify_bugs import planted

SMALL = ["model.heads=4", "model.kv_heads=2", "--steps", "2"]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"not installed: {package}")


@needs("megatron")
@pytest.mark.slow
def test_every_layout_of_megatron_on_two_processes_agrees(capsys) -> None:
    experts = ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=64", "model.moe.balance=sequence"]
    assert main(["verify-layout", "tiny", "--engine", "megatron", *SMALL, *experts, "--all", "2"]) == 0
    shown = capsys.readouterr().out
    assert "11 layouts of 2 processes on cpu, engine megatron; 2 rounds of micro-batches a step" in shown
    assert "muon" not in shown
    assert 'not possible: tp 2, whole experts: engine = "megatron" cannot do parallel.expert_tp = false' in shown
    assert shown.splitlines()[-1] == "10 of 10 layouts agree with one process"


@needs("deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_deepspeed_agrees_and_cuts_small_parameters_too(zero, capsys) -> None:
    overrides = [f"deepspeed.zero={zero}", "parallel.dp_shard=2"]
    assert main(["verify-layout", "tiny", "--engine", "deepspeed", *SMALL, *overrides]) == 0
    shown = capsys.readouterr().out
    assert "deepspeed.persistent 100000 -> 0" in shown
    assert "2 processes on cpu, engine deepspeed: dp_shard 2" in shown


def average_once_more(world: World) -> None:
    from parallel.engines.deepspeed import DeepSpeedEngine  # in a process of its own, where the package is

    forward_backward = DeepSpeedEngine.forward_backward
    DeepSpeedEngine.forward_backward = lambda self, batches, count: forward_backward(self, batches, 2 * count)


@needs("deepspeed")
@pytest.mark.slow
def test_a_bug_is_found_whatever_the_engine(capsys, monkeypatch) -> None:
    monkeypatch.setattr(Certifier, "measure", staticmethod(partial(planted, average_once_more)))
    overrides = ["deepspeed.zero=1", "parallel.dp_shard=2", "train.micro_batch=8"]
    assert main(["verify-layout", "tiny", "--engine", "deepspeed", *SMALL, *overrides]) == 1
    assert "Every gradient is 0.5 times: exactly 1 / parallel.dp_shard" in capsys.readouterr().out


@needs("megatron")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.kv_heads=1", "parallel.tp=2"], "cannot cut model.kv_heads = 1 over parallel.tp = 2"),
        (
            ["model.layers=3", "parallel.pp=2", "parallel.dp_shard=1"],
            "model.layers = 3 is not a multiple of the 2 stages",
        ),
        (["optim.name=muon"], 'engine = "megatron" cannot do optim.name = "muon"'),
        (["parallel.schedule=zbvzerobubble", "parallel.pp=2"], 'cannot do parallel.schedule = "zbvzerobubble"'),
    ],
)
def test_what_an_engine_cannot_do_is_said_before_anything_runs(overrides, said, capsys) -> None:
    assert main(["verify-layout", "tiny", "--engine", "megatron", *SMALL[:2], *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1

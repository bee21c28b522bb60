"""The Megatron-Core engine: the native engine's numbers in every layout, and what it refuses.

Everything that imports Megatron runs on ranks, which are processes of their own.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train
from pretrain.verify import run_steps
from tests.pretrain.test_train import losses, tensors
from tests.ranks import run_ranks
from tests.small import small_overrides

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core (pip extra megatron)"
)
SMALL = [
    "train.precision=fp32",
    "train.compile=off",
    "model.vocab_size=512",
    "model.hidden=64",
    "model.layers=4",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=96",
    "model.max_seq_len=64",
    "data.seq_len=64",
    "train.global_batch=8",
    "train.micro_batch=2",
    "optim.eps=1e-3",  # a gradient's size: AdamW would make whole steps of what is nothing but rounding
]
DENSE = ["model.tied=false", "model.qkv_bias=true", "model.qk_norm=head", "model.rope.theta=5000.0"]
TIED = ["model.tied=true", "model.norm=layer", "model.positions=learned", "model.gated=false", "model.activation=gelu"]
OTHER = [
    "model.tied=true",
    "model.mlp_bias=true",
    "model.out_bias=true",
    "model.qkv_bias=true",
    'model.pattern=["sliding","full"]',
    "model.window=9",
    "model.norm=rms_unit",
    "model.embedding_scale=8.0",
    "model.logit_softcap=20.0",
    "model.attention_softcap=30.0",
    "train.recompute=full",
]
MOE = ["model.tied=false", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=48"]
MIXED = [
    *MOE,
    "model.moe.first_dense=1",
    "model.moe.shared_ffn=32",
    "model.moe.shared_gate=true",
    "model.moe.scores=sigmoid",
    "model.moe.bias=true",
    "model.moe.groups=2",
    "model.moe.balance=sequence",
]
REPLICAS = ["parallel.dp_replicate=2", "parallel.dp_shard=1"]
INTERLEAVED = ["parallel.pp=2", "parallel.schedule=interleaved1f1b"]

Outcome = dict[str, Any]


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def _run(overrides: list[str], steps: int) -> Outcome:
    outcome = run_steps(resolve("tiny", [*SMALL, *overrides])[0], _world(), steps)
    return {"numbers": outcome.numbers["losses"], "norms": outcome.numbers["norms"], **outcome.tensors}


Case = tuple[list[str], list[list[str]]]  # overrides of the model, and layouts of it


def _compare(cases: list[Case]) -> list[dict[str, float]]:
    """How far each layout on Megatron is from the native engine, relative."""
    found = []
    for overrides, layouts in cases:
        native = _run(overrides, 4)
        found += [_distances(_run(["engine=megatron", *overrides, *layout], 4), native) for layout in layouts]
    return found


def _distances(ours: Outcome, native: Outcome) -> dict[str, float]:
    def furthest(kind: str) -> float:
        assert ours[kind]
        scale = max(float(tensor.norm()) for tensor in native[kind].values()) * 1e-3
        return max(_relative(ours[kind][name], native[kind][name], scale) for name in ours[kind])

    first = "gradient norm of step 1"
    return {
        "losses": max(_relative(ours["numbers"][name], value) for name, value in native["numbers"].items()),
        "first norm": _relative(ours["norms"][first], native["norms"][first]),
        "initial weights": furthest("initial weights"),
        "gradients": furthest("gradients"),
        "weights": furthest("weights"),
    }


def _relative(ours: Tensor | float, native: Tensor | float, scale: float = 1e-9) -> float:
    """scale: what smaller norms count as: a key's bias has no gradient but rounding."""
    ours, native = torch.as_tensor(ours).double(), torch.as_tensor(native).double()
    return float((ours - native).norm() / native.norm().clamp(min=scale))


def check(world: int, cases: list[Case]) -> None:
    limits = {"losses": 2e-6, "first norm": 1e-6, "initial weights": 0.0, "gradients": 5e-6, "weights": 2e-5}
    names = [(overrides, layout) for overrides, layouts in cases for layout in layouts]
    for found in run_ranks(_compare, world, cases, timeout=280):
        for name, distances in zip(names, found, strict=True):
            assert all(distances[key] <= limit for key, limit in limits.items()), (name, distances)


@needs_megatron
@pytest.mark.slow
def test_two_processes_equal_the_native_engine():
    """cp: documents are cut anywhere, and may not see each other."""
    tp, pp, cp = ["parallel.tp=2"], ["parallel.pp=2"], ["parallel.cp=2", "parallel.dp_shard=1"]
    shared, ep = ["parallel.dp_shard=2"], ["parallel.ep=2"]
    check(
        2,
        [
            (DENSE, [REPLICAS, shared, tp, pp, INTERLEAVED, cp, [*cp, "parallel.cp_method=ring"]]),
            ([*TIED, "train.recompute=selective"], [tp, pp]),
            (OTHER, [tp, pp]),
            (MOE, [ep, shared, tp, pp]),
            (MIXED, [ep, tp, [*cp, *ep]]),
        ],
    )


@needs_megatron
@pytest.mark.slow
def test_four_processes_equal_the_native_engine():
    tied = [["parallel.tp=2", "parallel.pp=2"], ["parallel.dp_shard=2", *INTERLEAVED]]
    mixed = [["parallel.tp=2", "parallel.ep=2"], ["parallel.ep=2", "parallel.pp=2"]]
    check(4, [(["model.tied=true"], tied), (MIXED, mixed)])


def _trainings(runs: list[tuple[Path, Path, list[str]]]) -> None:
    for folder, shards, overrides in runs:
        train(_config(folder, shards, overrides), _world())


def _config(folder: Path, shards: Path, overrides: list[str]) -> RunConfig:
    model = ["model.heads=4", "model.kv_heads=2", "train.precision=fp32", "train.micro_batch=2", "train.steps=6"]
    return resolve("tiny", [*small_overrides(folder, shards), *model, *overrides])[0]


@needs_megatron
@pytest.mark.slow
def test_mixed_precision_is_that_of_the_native_engine(tmp_path, tiny_shards):
    layouts = {"native": [], "tp": ["engine=megatron", "parallel.tp=2"], "pp": ["engine=megatron", "parallel.pp=2"]}
    bf16 = ["train.precision=bf16", "train.steps=10"]
    run_ranks(_trainings, 2, [(tmp_path / name, tiny_shards, [*bf16, *over]) for name, over in layouts.items()])
    for name in ("tp", "pp"):
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "native"), rtol=2e-3, atol=0)
        moments = tensors(tmp_path / name, 10)
        assert all(tensor.dtype == torch.float32 for tensor in moments.values())


REFUSED = {
    "model.kv_heads = 1 over parallel.tp = 2": ["parallel.tp=2", "model.kv_heads=1"],
    "model.vocab_size = 511": ["parallel.tp=2", "model.vocab_size=511"],
    "model.layers = 3 is not a multiple of the 2 stages": ["parallel.pp=2", "model.layers=3"],
    "train.global_batch = 6 is not a multiple of 4": [*INTERLEAVED, "train.global_batch=6"],
    "1f1b has one stage a process": ["parallel.pp=2", "parallel.stages_per_rank=2"],
    "parallel.ep = 2, but the model has no experts": ["parallel.ep=2"],
}


def _refusals(cases: list[list[str]]) -> list[str]:
    messages = []
    for overrides in cases:
        config = resolve("tiny", [*SMALL, "engine=megatron", *overrides])[0]
        try:
            build_engine(config, _world(), OBJECTIVES["causal"][1](config.objective))
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("nothing")
    return messages


@needs_megatron
@pytest.mark.slow
def test_layouts_are_refused_before_anything_runs():
    for messages in run_ranks(_refusals, 2, list(REFUSED.values()), timeout=120):
        for words, message in zip(REFUSED, messages, strict=True):
            assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.qk_norm=full"], "model.qk_norm"),
        (["model.norm_position=post"], "model.norm_position"),
        (["model.mlp_bias=true"], "model.qkv_bias|model.out_bias"),
        (["model.moe.choice=expert", "model.moe.balance=none"], "model.moe.choice"),
        (["model.moe.capacity=1.25"], "model.moe.capacity"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_models_are_refused_with_the_recipe(overrides, key):
    with pytest.raises(ValueError, match=f"cannot do ({key}).*torch") as raised:
        resolve("tiny", ["engine=megatron", "train.precision=fp32", *overrides])
    assert "\n" not in str(raised.value)

"""Planned parameter and optimizer bytes against the real program: rank k of a world that is not there, on meta."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import parallelize as parallelize_module
from parallel.materialise import name_stages
from parallel.mesh import Mesh
from parallel.parallelize import cut_stages, parallelize
from parallel.pipeline_cut import stages_of
from parallel.planner.layout import Layout
from parallel.planner.memory import local_elements, stage_parameters
from parallel.planner.shape import ModelShape, read_shape
from pretrain import train
from pretrain.config import resolve
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
GIB = 2**30


def shape_of(config) -> ModelShape:
    family = FAMILIES[config.model.family]
    with torch.device("meta"):
        model = family.build(config.model)
    seq_len = config.data.seq_len
    return read_shape(
        model, family.plan(config.model), seq_len, config.model.attention_flops_per_token(seq_len)
    )


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def real_bytes(config, degrees: dict[str, int], rank: int, monkeypatch, step: bool) -> tuple[int, int, list[range]]:
    """Bytes of parameters and of optimizer state that one rank of the real program holds; the pipeline's stages."""
    monkeypatch.setattr(parallelize_module, "init_parameters", lambda *_: None)  # values do not matter
    monkeypatch.setattr(train, "make_engine", lambda _name, spec, _world: spec)
    spec = train.build_engine(config, None, OBJECTIVES["causal"][1](config.objective))
    dist.init_process_group("fake", rank=rank, world_size=prod(degrees.values()), store=FakeStore())
    try:
        mesh = Mesh(degrees, "cpu")
        cut = cut_stages(spec, mesh)
        stages = parallelize(spec, mesh, torch.device("meta"))
        named = name_stages((stage.model for stage in stages.values()), spec.plan.tied)
        copies = {n: t for n, t in named.copies.items() if all(t is not other for other in named.tensors.values())}
        held = {**named.tensors, **copies}
        state = 0
        if step:
            optimizer = spec.make_optimizer(held.items())
            for tensor in held.values():
                tensor.grad = torch.zeros_like(tensor)
            optimizer.step()
            states = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
            state = sum(local_bytes(value) for value in states if isinstance(value, torch.Tensor))
        return sum(local_bytes(tensor) for tensor in held.values()), state, cut
    finally:
        dist.destroy_process_group()


def coordinates(rank: int, degrees: dict[str, int]) -> dict[str, int]:
    found = {}
    for axis in reversed(AXES):
        found[axis] = rank % degrees[axis]
        rank //= degrees[axis]
    return found


LAYOUTS = [
    ("llama3-8b", {"dp_shard": 8}, "1f1b", (0, 7)),
    ("llama3-8b", {"dp_replicate": 4, "dp_shard": 96}, "1f1b", (0, 95, 383)),  # rows that 96 does not divide
    ("llama3-8b", {"dp_shard": 16, "cp": 2, "tp": 8}, "1f1b", (0, 255)),
    ("gpt2", {"dp_shard": 5}, "1f1b", (0, 4)),  # uneven everywhere, biases, positions, tied
    ("gpt2", {"pp": 3, "dp_shard": 4}, "1f1b", (0, 5, 11)),  # the tied head is a parameter of its own
    ("gpt2", {"pp": 2, "dp_shard": 2}, "zbvzerobubble", (0, 3)),  # both ends on one process: it has both copies
    ("llama3-1b", {"pp": 4, "dp_shard": 8, "tp": 4}, "interleaved1f1b", (0, 77, 127)),
    ("qwen2-7b", {"dp_shard": 4, "tp": 4}, "1f1b", (0, 15)),  # biases
    ("qwen3-0.6b", {"dp_shard": 2, "tp": 16}, "1f1b", (0, 31)),  # fewer key/value heads than tp
    ("llama3-70b", {"dp_shard": 4096}, "1f1b", (0, 4095)),
    ("llama3-70b", {"pp": 8, "dp_replicate": 4, "dp_shard": 8, "cp": 2, "tp": 8}, "1f1b", (0, 2047, 4095)),
]


@pytest.mark.parametrize(("recipe", "wide", "schedule", "ranks"), LAYOUTS, ids=lambda value: str(value))
def test_parameter_bytes_are_exact_on_every_kind_of_rank(recipe, wide, schedule, ranks, monkeypatch):
    degrees = {**dict.fromkeys(AXES, 1), **wide}
    words = [*(f"parallel.{axis}={degree}" for axis, degree in degrees.items()), f"parallel.schedule={schedule}"]
    words += ["train.compile=off", "train.micro_batch=1", "train.global_batch=16384", "train.recompute=none"]
    config = resolve(recipe, words)[0]
    shape = shape_of(config)
    layout = Layout(**degrees, schedule=schedule)
    for rank in ranks:
        parameters, _, cut = real_bytes(config, degrees, rank, monkeypatch, step=False)
        at = coordinates(rank, degrees)
        held = stages_of(schedule, at["pp"], degrees["pp"], len(cut)) if degrees["pp"] > 1 else [0]
        planned = 0
        for stage in held:
            last = stage == len(cut) - 1
            mine = stage_parameters(shape, cut[stage], stage == 0, last)
            shard_rank = at["dp_shard"] * degrees["cp"] + at["cp"]
            planned += sum(4 * local_elements(p, shape, layout, at["tp"], shard_rank) for p in mine)
        assert planned == parameters, f"rank {rank}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_bytes_are_exact(optimizer, monkeypatch):
    degrees = {**dict.fromkeys(AXES, 1), "dp_shard": 6}
    config = resolve("gpt2", [f"optim.name={optimizer}", "train.compile=off", "parallel.dp_shard=6"])[0]
    shape, layout = shape_of(config), Layout(dp_shard=6)
    for rank in (0, 5):
        parameters, state, _ = real_bytes(config, degrees, rank, monkeypatch, step=True)
        every = stage_parameters(shape, range(len(shape.layers)), True, True)
        planned = sum(
            local_elements(p, shape, layout, 0, rank) * state_bytes(p, optimizer) for p in every
        )
        assert planned == state
        assert optimizer == "muon" or state == 2 * parameters

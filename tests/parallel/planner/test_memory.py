"""Planned bytes of weights, gradients and optimizer against the real program: rank k of a world that is not there, on
meta."""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import parallelize as parallelize_module
from parallel.materialise import name_stages
from parallel.mesh import AXES, Mesh, resolve_degrees
from parallel.parallelize import parallelize
from parallel.planner.gpus import GPUS
from parallel.planner.layout import Layout, Program, Setting, in_flight
from parallel.planner.memory import plan_memory, process_memory
from parallel.planner.pieces import layout_degrees, local_elements, piece, stage_parameters
from parallel.planner.shape import Parameter
from pretrain.config import RunConfig, resolve
from pretrain.engine import make_spec
from pretrain.objectives import OBJECTIVES
from pretrain.planner import ask, stage_cuts

MOE = [
    "model.moe.experts=8",
    "model.moe.top_k=2",
    "model.moe.ffn=96",
    "model.moe.first_dense=1",
    "model.vocab_size=512",
]


def config_of(recipe: str, degrees: dict[str, int], *more: str) -> RunConfig:
    words = [f"parallel.{axis}={degree}" for axis, degree in (dict.fromkeys(AXES, 1) | degrees).items()]
    batch = 16 * degrees.get("dp_shard", 1) * degrees.get("dp_replicate", 1)
    common = ["train.compile=off", "train.micro_batch=1", f"train.global_batch={batch}", "train.recompute=none"]
    return resolve(recipe, [*words, *common, *more])[0]


def setting_of(config: RunConfig) -> Setting:
    """As `pretrain plan` makes it."""
    parallel, gpus = config.parallel, prod(getattr(config.parallel, axis) for axis in AXES)
    question = ask(config, {}, gpus, GPUS["h100"])
    schedule = parallel.schedule.lower()
    chunks = {"zbvzerobubble": 2, "interleaved1f1b": 2}.get(schedule, 1)
    degrees = {axis: getattr(parallel, axis) for axis in (*AXES, "ep")}
    layout = Layout(**degrees, expert_tp=parallel.expert_tp, schedule=schedule, chunks=chunks, keep=parallel.pp > 1)
    batch = config.train.global_batch
    return Setting(question.space.shape, layout, question.program, GPUS["h100"], batch, stage_cuts(question)(layout))


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def real_bytes(config: RunConfig, rank: int, monkeypatch, step: bool) -> tuple[int, int]:
    """Bytes of parameters and of optimizer state that one rank of the real program holds."""
    monkeypatch.setattr(parallelize_module, "init_parameters", lambda *_: None)  # values do not matter
    spec = make_spec(config, OBJECTIVES["causal"][1](config.objective))
    world = prod(getattr(config.parallel, axis) for axis in AXES)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        stages = parallelize(spec, Mesh(resolve_degrees(config.parallel, world), "cpu"), torch.device("meta"))
        named = name_stages((stage.model for stage in stages.values()), spec.plan.tied)
        copies = {n: t for n, t in named.copies.items() if all(t is not other for other in named.tensors.values())}
        held = {**named.tensors, **copies}
        state = 0
        if step:
            optimizer = spec.make_optimizer(held.items())
            for group in optimizer.param_groups:
                group["fused"] = False  # there is no such kernel on meta
            for tensor in held.values():
                tensor.grad = torch.zeros_like(tensor)
            optimizer.step()
            states = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
            state = sum(local_bytes(value) for value in states if isinstance(value, torch.Tensor))
        return sum(local_bytes(tensor) for tensor in held.values()), state
    finally:
        dist.destroy_process_group()


def coordinates(rank: int, config: RunConfig) -> dict[str, int]:
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, getattr(config.parallel, axis))
    return found


# Recipe, degrees, other settings; ranks of which each is the first or the last in some group.
LAYOUTS = [
    ("llama3-8b", {"dp_shard": 8}, [], (0, 7)),
    ("llama3-8b", {"dp_replicate": 4, "dp_shard": 96}, [], (0, 383)),  # rows that 96 does not divide
    ("llama3-8b", {"dp_shard": 16, "cp": 2, "tp": 8}, [], (0, 255)),
    ("gpt2", {"dp_shard": 5}, [], (0, 4)),  # uneven everywhere, biases, positions, tied
    ("gpt2", {"pp": 3, "dp_shard": 4}, [], (0, 5, 11)),  # the tied head is a parameter of its own
    ("gpt2", {"pp": 2, "dp_shard": 2}, ["parallel.schedule=zbvzerobubble"], (0, 3)),  # rank 0 has both copies
    ("llama3-1b", {"pp": 4, "dp_shard": 8, "tp": 4}, ["parallel.schedule=interleaved1f1b"], (0, 77, 127)),
    ("qwen2-7b", {"dp_shard": 4, "tp": 4}, [], (0, 15)),  # biases
    ("qwen3-0.6b", {"dp_shard": 2, "tp": 16}, [], (0, 31)),  # fewer key/value heads than tp
    ("tiny", {"dp_shard": 4, "ep": 4}, MOE, (0, 3)),
    ("tiny", {"dp_shard": 4, "ep": 2, "tp": 2}, MOE, (0, 7)),  # experts cut over tp as well
    ("tiny", {"dp_shard": 4, "ep": 2, "tp": 2}, [*MOE, "parallel.expert_tp=false"], (0, 7)),
    ("tiny", {"dp_shard": 3, "pp": 2}, MOE, (0, 5)),  # experts whole
    ("llama3-70b", {"dp_shard": 4096}, ["model.layers=8"], (0, 4095)),
    ("llama3-70b", {"pp": 8, "dp_replicate": 4, "dp_shard": 8, "cp": 2, "tp": 8}, [], (0, 2047, 4095)),
]


@pytest.mark.parametrize(("recipe", "degrees", "more", "ranks"), LAYOUTS, ids=lambda value: str(value)[:60])
def test_weights_are_exact_on_every_kind_of_rank(recipe, degrees, more, ranks, monkeypatch):
    config = config_of(recipe, degrees, *more)
    setting = setting_of(config)
    cutting = layout_degrees(setting.layout, setting.shape.kv_heads)
    for rank in ranks:
        real, _ = real_bytes(config, rank, monkeypatch, step=False)
        at = coordinates(rank, config)
        part = setting.parts[at["pp"]]
        shard_rank = at["dp_shard"] * setting.layout.cp + at["cp"]
        own = stage_parameters(setting.shape, (), part.first, part.last, setting.layout.pp)
        for count, layer in zip(part.layers, setting.shape.layer_kinds, strict=True):
            own += layer.parameters * count
        assert sum(4 * local_elements(p, cutting, at["tp"], shard_rank) for p in own) == real, f"rank {rank}"
        if not shard_rank and not at["tp"]:
            terms = process_memory(setting, part, at["pp"]).terms
            assert terms["weights"] == terms["gradients"] == real, f"rank {rank}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("recipe", "degrees", "more"),
    [
        ("gpt2", {"dp_shard": 6}, []),
        ("gpt2", {"pp": 2, "dp_shard": 3}, []),
        ("llama3-1b", {"dp_shard": 2, "cp": 2, "tp": 4}, []),
        ("tiny", {"dp_shard": 4, "ep": 2}, MOE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_optimizer_bytes_are_exact(optimizer, recipe, degrees, more, monkeypatch):
    """Muon keeps one moment of matrices in layers, AdamW two of everything."""
    config = config_of(recipe, degrees, f"optim.name={optimizer}", *more)
    setting = setting_of(config)
    # One rank only: torch keeps plans of redistribution, with their groups, beyond the end of a world.
    pp_rank = len(setting.parts) - 1
    rank = pp_rank * prod(degrees.get(axis, 1) for axis in AXES if axis != "pp")
    real, state = real_bytes(config, rank, monkeypatch, step=True)
    terms = process_memory(setting, setting.parts[pp_rank], pp_rank).terms
    assert (terms["weights"], terms["optimizer"]) == (real, state)


def test_what_is_printed_is_the_fullest_process():
    setting = setting_of(config_of("gpt2", {"pp": 4, "dp_shard": 2}))
    every = [process_memory(setting, part, rank).total for rank, part in enumerate(setting.parts)]
    assert plan_memory(setting).total == max(every) > min(every)


@pytest.mark.parametrize(("size", "pieces"), [(10, 4), (7, 8), (8, 8), (9, 2)])
def test_pieces_are_torch_chunks(size, pieces):
    chunks = [len(chunk) for chunk in torch.arange(size).chunk(pieces)]
    assert [piece(size, pieces, index) for index in range(pieces)] == chunks + [0] * (pieces - len(chunks))


def test_a_bias_of_a_row_cut_matrix_is_whole_on_every_process():
    degrees = layout_degrees(Layout(tp=4), kv_heads=4)
    assert local_elements(Parameter("out.bias", (64,), "row"), degrees) == 64
    assert local_elements(Parameter("out.weight", (64, 32), "row"), degrees) == 64 * 8


def test_recomputation_and_context_parallelism_lower_activations():
    config = config_of("llama3-8b", {"dp_shard": 8})
    base = setting_of(config)

    def activations(**changes: object) -> float:
        return plan_memory(replace(base, layout=replace(base.layout, **changes))).terms["activations"]

    none, selective, full = (activations(recompute=policy) for policy in ("none", "selective", "full"))
    assert none > selective > full
    assert activations(cp=2, dp_shard=4) == pytest.approx(none / 2)
    assert full < activations(recompute="full", recompute_every=2) < none


def test_micro_batches_in_flight_follow_the_schedule():
    assert in_flight(Layout(pp=4), 16) == 4
    assert in_flight(Layout(pp=4, schedule="gpipe"), 16) == 16
    assert in_flight(Layout(pp=4, schedule="interleaved1f1b", chunks=2), 16) == pytest.approx(5.5)
    assert in_flight(Layout(pp=4), 2) == 2


def test_defaults_of_the_program_are_those_of_a_bf16_run():
    config = config_of("llama3-8b", {"dp_shard": 8})
    assert setting_of(config).program == Program(compiled=False, fused=False)

"""Tensor and sequence parallelism: every style gives the loss and the gradients of one process, in fp64."""

import pytest
import torch
import torch.distributed as dist

from parallel.gradients import local
from parallel.plan import Plan
from parallel.tensor import check_tensor, local_kv_heads
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from tests.ranks import run_ranks

SMALL = [
    "train.precision=fp64",
    "model.vocab_size=67",  # no degree divides it
    "model.hidden=32",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
    "data.seq_len=16",
]
MLA = [
    "model.kv_heads=0",
    "model.mla.kv_rank=18",
    "model.mla.nope_dim=6",
    "model.mla.rope_dim=4",
    "model.mla.v_dim=5",
]
VARIANTS = {
    "llama": [],
    "gpt2": [
        "model.positions=learned",
        "model.norm=layer",
        "model.qkv_bias=true",
        "model.out_bias=true",
        "model.mlp_bias=true",
        "model.gated=false",
        "model.tied=true",
        "model.kv_heads=4",
    ],
    "olmo2": ["model.qk_norm=full", "model.norm_position=post", "model.kv_heads=4"],
    "gemma3": [
        "model.qk_norm=head",
        "model.norm_position=both",
        "model.kv_heads=1",
        'model.pattern=["sliding","full"]',
        "model.window=5",
        "model.logit_softcap=3.0",
        "objective.z_loss=0.01",
    ],
    "deepseek": [*MLA, "model.mla.q_rank=24", "model.out_bias=true", "model.rope.scaling=yarn", "model.rope.factor=4"],
    "deepseek-lite": [*MLA, "model.mla.q_rank=0"],
}


def gradients(overrides: list[str]) -> dict[str, torch.Tensor]:
    """Of one step on fixed data, whole, by name; "loss" and "norm" too."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = resolve("tiny", [*SMALL, *overrides])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(rank, size, torch.device("cpu")), objective)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 67, (4, 17), generator=generator)
    documents = (torch.rand(4, 16, generator=generator) < 0.2).cumsum(1).int()
    rows = torch.arange(4).chunk(engine.data_world)[engine.data_rank]
    batch = {
        "tokens": tokens[rows, :-1],
        "targets": tokens[rows, 1:],
        "positions": torch.arange(16).expand(len(rows), 16),
        "documents": documents[rows],
    }
    batch["targets"] = batch["targets"].masked_fill(batch["targets"] < 5, -100)
    single = ({name: value[i : i + 1] for name, value in batch.items()} for i in range(len(rows)))
    microbatches = [objective.collate(each) for each in single]
    count = engine.sum_over_data(torch.tensor(objective.count(microbatches)))
    sums = engine.forward_backward(microbatches, count)
    named = engine.gradients().items()
    result = {name: (grad.full_tensor() if size > 1 else grad).clone() for name, grad in named}
    return result | {"loss": sums["loss"], "norm": engine.clip_grad_norm()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "tp"), [(2, 2), (4, 4), (4, 2)], ids=["tp2", "tp4", "dp2xtp2"])
def test_equals_one_process(variant, world, tp):
    expected = gradients(VARIANTS[variant])
    for found in run_ranks(gradients, world, [*VARIANTS[variant], f"parallel.tp={tp}"]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = (found[name] - value).abs().max()
            assert difference <= 1e-10 * value.abs().max() + 1e-13, f"{name} is off by {difference}"


def test_gradients_lie_as_their_parameters():
    run_ranks(_check_placements, 4)


def _check_placements() -> None:
    config = resolve("tiny", [*SMALL, "model.kv_heads=1", "parallel.tp=4"])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(dist.get_rank(), 4, torch.device("cpu")), objective)
    batch = {name: torch.zeros(1, 16, dtype=torch.int64) for name in ("tokens", "targets", "positions", "documents")}
    engine.forward_backward([objective.collate(batch)], torch.tensor(16))
    parameters = engine.state_dict()["model"]
    for name, gradient in engine.gradients().items():
        assert gradient.placements == parameters[name].placements
        assert local(gradient).shape == local(parameters[name]).shape


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (8, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (12, 6, 4, [[0, 0, 1], [1, 2, 2], [3, 3, 4], [4, 5, 5]]),  # groups would not be equal: one a query head
        (4, 1, 4, [[0], [0], [0], [0]]),
    ],
)
def test_each_process_has_the_key_value_heads_of_its_queries(heads, kv_heads, size, expected):
    plan = Plan(blocks="", heads=heads, kv_heads=kv_heads)
    assert [local_kv_heads(plan, rank, size) for rank in range(size)] == expected


@pytest.mark.parametrize(
    ("tp", "seq_len", "message"),
    [
        (4, 64, r"parallel.tp = 4 does not divide the model's 6 heads; set it to one of \[1, 2, 3, 6\]"),
        (3, 64, "parallel.tp = 3 does not divide the 64 tokens of a sequence"),
    ],
)
def test_degrees_that_do_not_divide(tp, seq_len, message):
    with pytest.raises(ValueError, match=message):
        check_tensor(Plan(blocks="", heads=6, kv_heads=6), tp, seq_len)

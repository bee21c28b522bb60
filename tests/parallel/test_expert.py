"""Expert parallelism: every way to spread experts gives what one process gives, in fp64, and sends what it must."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallel.expert import check_experts
from parallel.mesh import ParallelConfig, resolve_degrees
from parallel.plan import Plan
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train_step
from tests.parallel.ledger import Ledger
from tests.ranks import run_ranks

ROWS, S, H, F, E, K, LAYERS = 8, 16, 32, 24, 4, 2, 2
MODEL = [
    "model.vocab_size=64",
    f"model.hidden={H}",
    f"model.layers={LAYERS}",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
    f"data.seq_len={S}",
    f"model.moe.experts={E}",
    f"model.moe.top_k={K}",
    f"model.moe.ffn={F}",
]
BIAS = ["model.moe.bias=true", "model.moe.bias_rate=0.01", "model.moe.scores=sigmoid", "model.moe.shared_ffn=16"]
WHOLE = "parallel.expert_tp=false"
CASES = {
    "plain": (
        [],
        ["dp_shard=2 ep=2", "cp=2 ep=2", "tp=2", f"tp=2 {WHOLE}", "pp=2"],
        ["dp_shard=4 ep=2", "dp_shard=4 ep=4", "dp_replicate=2 dp_shard=2 ep=2", "pp=2 dp_shard=2 ep=2"],
    ),
    "bias, shared, groups": (
        [
            *BIAS,
            "model.moe.groups=2",
            "model.moe.shared_gate=true",
            "model.moe.z_weight=0.01",
            "model.moe.first_dense=1",
        ],
        ["dp_shard=2 ep=2", "tp=2 train.recompute=full"],
        ["dp_shard=2 tp=2 ep=2", f"dp_shard=2 tp=2 ep=2 {WHOLE} train.recompute=selective"],
    ),
    "whole sequences": (
        ["model.moe.balance=sequence", "model.moe.capacity=1.0"],
        ["dp_shard=2 ep=2 train.recompute=full"],
        ["cp=2 tp=2 ep=2", "cp=2 tp=2 parallel.cp_method=ring ep=2"],
    ),
    "experts choose": (["model.moe.choice=expert", "model.moe.balance=none"], ["dp_shard=2 ep=2"], ["cp=2 tp=2 ep=2"]),
}


def overrides(layout: str) -> list[str]:
    return [word if "." in word else f"parallel.{word}" for word in layout.split()]


def run(settings: list[str], micro_batch: int = 2, steps: int = 3) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses, norms and loads of all steps; the gradients of the last one and the weights after it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = resolve("tiny", [*MODEL, f"train.micro_batch={micro_batch}", f"train.global_batch={ROWS}", *settings])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(rank, size, torch.device("cpu")), objective)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (ROWS, S + 1), generator=generator)
    documents = (torch.rand(ROWS, S, generator=generator) < 0.2).cumsum(1).int()
    mine = torch.arange(ROWS).chunk(engine.data_world)[engine.data_rank]
    batches = [
        objective.collate(
            {
                "tokens": tokens[rows, :-1],
                "targets": tokens[rows, 1:],
                "positions": torch.arange(S).expand(len(rows), S),
                "documents": documents[rows],
            }
        )
        for rows in mine.split(micro_batch)
    ]
    numbers = {}
    for step in range(steps):
        values, _ = train_step(engine, objective, batches, 1e-2)
        for name in ("loss", "grad_norm", "balance_loss", "z_loss", "router_rows"):
            for index, value in enumerate(values[name].flatten().tolist()):
                numbers[f"{name} {index} of step {step}"] = value
    weights = engine.state_dict()["model"].items()
    return numbers, {n: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for n, w in weights}


def run_all(settings: list[str], layouts: list[str]) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    return [run([*settings, *overrides(layout)]) for layout in layouts]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(case, world):
    settings, *by_world = CASES[case]
    settings = ["train.precision=fp64", *settings]
    layouts = by_world[world // 4]
    numbers, weights = run(settings)
    ranks = run_ranks(run_all, world, settings, layouts)
    for index, layout in enumerate(layouts):
        found = {name: tensor for rank in ranks for name, tensor in rank[index][1].items()}
        assert found.keys() == weights.keys()
        for rank in ranks:
            assert rank[index][0] == pytest.approx(numbers, rel=1e-10, abs=1e-13), layout
        for name, value in weights.items():
            difference = (found[name] - value).abs().max()
            assert difference <= 1e-10 * value.abs().max(), f"{layout}: {name} is off by {difference}"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_biases_are_equal_to_the_bit_under_every_ep_and_accumulation():
    def biases(result) -> list[torch.Tensor]:
        return [tensor for name, tensor in result[1].items() if name.endswith("routing.bias")]

    settings = [*BIAS, "train.precision=fp32"]
    expected = biases(run(settings, steps=4))
    assert len(expected) == LAYERS
    assert all(bias.unique().numel() > 1 and bias.dtype == torch.float32 for bias in expected)
    for accumulated in (run(settings, micro_batch=4, steps=4), run(settings, micro_batch=8, steps=4)):
        assert all(map(torch.equal, biases(accumulated), expected))
    for ep in (1, 2, 4):
        for micro_batch in (1, 2):
            for rank in run_ranks(run, 4, [*settings, "parallel.dp_shard=4", f"parallel.ep={ep}"], micro_batch, 4):
                assert all(map(torch.equal, biases(rank), expected)), f"ep {ep}, micro-batches of {micro_batch}"


def traffic(settings: list[str]) -> tuple[int, int, list[int]]:
    """All-to-alls of a step of one micro-batch, their bytes, and the rows each expert got."""
    config = resolve("tiny", [*MODEL, "train.micro_batch=2", *settings])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), objective)
    generator = torch.Generator().manual_seed(engine.data_rank)
    tokens = torch.randint(0, 64, (2, S), generator=generator)
    zeros = torch.zeros_like(tokens)
    batch = {"tokens": tokens, "targets": tokens, "positions": zeros, "documents": zeros}
    with Ledger() as ledger:
        values, _ = train_step(engine, objective, [objective.collate(batch)], 1e-3)
    count = 2 * S * engine.data_world
    rows = (values["router_rows"] * count).round().int()
    return ledger.calls["all_to_all"], ledger.bytes["all_to_all"], rows.tolist()


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_all_to_alls_carry_the_rows_and_no_more(precision, size):
    found = run_ranks(traffic, 2, ["parallel.dp_shard=2", "parallel.ep=2", f"train.precision={precision}"])
    sent = K * 2 * S  # rows of a process
    each = 4 * sent * H * size + E * 8  # there and back, forward and backward; the counts
    assert [sum(rows) for rows in found[0][2]] == [2 * sent] * LAYERS
    assert [calls for calls, _, _ in found] == [LAYERS * 5] * 2
    assert sum(size for _, size, _ in found) == 2 * LAYERS * each


def test_experts_lie_where_they_are_said_to():
    for rank, shapes in enumerate(run_ranks(_shapes, 4)):
        assert shapes == {"gate": (E // 2, F // 2, H), "up": (E // 2, F // 2, H), "down": (E // 2, H, F // 2)}, rank


def _shapes() -> dict[str, tuple[int, ...]]:
    config = resolve("tiny", [*MODEL, "train.micro_batch=1", *overrides("dp_shard=2 tp=2 ep=2")])[0]
    objective = OBJECTIVES["causal"][1](config.objective)
    engine = build_engine(config, World(dist.get_rank(), 4, torch.device("cpu")), objective)
    named = {name: tensor for name, tensor in engine.state_dict()["model"].items() if "layers.0.moe.experts" in name}
    return {name.rpartition(".")[2]: tuple(tensor.to_local().shape) for name, tensor in named.items()}


@pytest.mark.parametrize(
    ("plan", "ep", "message"),
    [
        (Plan(blocks=""), 2, "parallel.ep = 2, but the model has no experts; set parallel.ep to 1"),
        (Plan(blocks="", experts=6), 4, r"parallel.ep = 4 does not divide the model's 6 experts; .* \[1, 2, 3, 6\]"),
    ],
)
def test_ep_that_does_not_divide_the_experts(plan, ep, message):
    with pytest.raises(ValueError, match=message):
        check_experts(plan, ep)


def test_ep_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"parallel.ep = 2 does not divide parallel.dp_shard 1 x parallel.cp 1, of which"
    ):
        resolve_degrees(ParallelConfig(dp_shard=1, tp=4, ep=2), 4)
    assert resolve_degrees(ParallelConfig(cp=2, ep=4), 8)["ep"] == 4

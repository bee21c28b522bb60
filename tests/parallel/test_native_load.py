"""State that is read into an engine which has computed already."""

import torch
import torch.distributed as dist

from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from tests.ranks import run_ranks

CONFIG = resolve(
    "tiny",
    [
        "train.precision=fp64",
        "model.vocab_size=64",
        "model.hidden=32",
        "model.layers=1",
        "model.heads=2",
        "model.kv_heads=1",
        "model.ffn=48",
        "data.seq_len=16",
        "train.global_batch=4",
        "train.micro_batch=2",
    ],
)[0]


def _loss(first_evaluated: bool) -> torch.Tensor:
    """Of the initial weights halved; before that the engine may have computed with the whole ones."""
    objective = OBJECTIVES["causal"][1](CONFIG.objective)
    engine = build_engine(CONFIG, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), objective)
    rows = torch.arange(32).reshape(2, 16) % 64
    zeros = torch.zeros(2, 16, dtype=torch.int64)
    batch = objective.collate({"tokens": rows, "targets": rows + 1, "positions": rows % 16, "documents": zeros})
    if first_evaluated:
        engine.evaluate([batch])
    state = engine.state_dict()
    for tensor in state["model"].values():
        tensor.mul_(0.5)
    engine.load_state_dict(state)
    return engine.evaluate([batch])["loss"]


def _check() -> None:
    assert torch.equal(_loss(first_evaluated=True), _loss(first_evaluated=False))


def test_what_an_evaluation_gathered_is_not_used_again():
    run_ranks(_check, 2, timeout=120)

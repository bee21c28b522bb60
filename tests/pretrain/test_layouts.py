"""Whole runs under parallel layouts: repeatable to the bit, resumed exactly, and continued under any other layout."""

import pytest
import torch
import torch.distributed as dist

from parallel.world import World
from pretrain.config import RunConfig
from pretrain.load import load_trained
from pretrain.train import train
from tests.pretrain.test_train import ALONE, assert_same_tensors, losses, small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

MODEL = ["model.layers=4", "model.heads=4", "model.kv_heads=2", "train.micro_batch=1", "train.steps=6"]
LAYOUTS = {
    "dp2-tp2": ["parallel.tp=2"],
    "cp2-tp2-ring": ["parallel.cp=2", "parallel.tp=2", "parallel.cp_method=ring"],
    "pp2-dp2": ["parallel.pp=2"],
    "zbv2-tp2": ["parallel.pp=2", "parallel.tp=2", "parallel.schedule=zbvzerobubble"],
    "replicate2-cp2": ["parallel.dp_replicate=2", "parallel.cp=2", "train.recompute=selective"],
}


def _train_on_rank(configs: list[RunConfig]) -> None:
    for config in configs:
        train(config, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_repeats_and_resumes_bit_for_bit(tmp_path, tiny_shards, layout):
    """The second run is the first one again up to its stop, and then its resumption."""
    chosen = [*MODEL, *LAYOUTS[layout], "train.precision=bf16"]
    runs = (("whole", []), ("halves", ["train.stop_at=3"]), ("halves", []))
    configs = [small_config(tmp_path / name, tiny_shards, *chosen, *more) for name, more in runs]
    run_ranks(_train_on_rank, 4, configs, timeout=180)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_tensors(tmp_path / "whole", tmp_path / "halves", 6)


@pytest.mark.parametrize(("tied", "optimizer"), [("true", "adamw"), ("false", "muon")])
def test_a_run_changes_its_layout_at_every_checkpoint(tmp_path, tiny_shards, tied, optimizer):
    shared = [*MODEL, f"model.tied={tied}", f"optim.name={optimizer}", "optim.muon_precision=fp32"]
    train(small_config(tmp_path / "one", tiny_shards, *shared), ALONE)
    run_ranks(
        _train_on_rank,
        4,
        [
            small_config(tmp_path / "many", tiny_shards, *shared, *layout, f"train.stop_at={step}")
            for step, layout in enumerate([*LAYOUTS.values(), []], start=1)
        ],
        timeout=240,
    )
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)
    one, many = load_trained(tmp_path / "one").model, load_trained(tmp_path / "many").model
    for (name, ours), (_, theirs) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert (ours - theirs).abs().max() < 5e-5, name

"""Multi-head latent attention on the Megatron-Core engine: the native engine's numbers, and resumes from and to it."""

import pytest

from tests.parallel.test_engine_megatron import MIXED, _trainings, check, needs_megatron
from tests.parallel.test_engines_agree import LOSSES, MOMENTS, WEIGHTS, check_tensors, saved
from tests.pretrain.test_train import losses
from tests.ranks import run_ranks

LATENT = [
    "model.kv_heads=0",
    "model.mla.kv_rank=18",
    "model.mla.nope_dim=6",
    "model.mla.rope_dim=4",
    "model.mla.v_dim=5",
]
PLAIN = [*LATENT, "model.mla.q_rank=0", "model.mlp_bias=true", "model.out_bias=true", "model.norm=layer"]
YARN = ["model.rope.scaling=yarn", "model.rope.factor=4.0", "model.rope.mscale_all_dim=0.7"]
DEEPSEEK = [*LATENT, "model.mla.q_rank=24", *YARN, *(key for key in MIXED if "shared_gate" not in key)]


@needs_megatron
@pytest.mark.slow
def test_two_processes_equal_the_native_engine():
    """cp: documents are cut anywhere, and may not see each other. Ring: values are narrower than keys."""
    tp, pp, cp = ["parallel.tp=2"], ["parallel.pp=2"], ["parallel.cp=2", "parallel.dp_shard=1"]
    shared, ep = ["parallel.dp_shard=2"], ["parallel.ep=2"]
    ring = [*cp, "parallel.cp_method=ring"]
    check(2, [(PLAIN, [shared, tp, pp, cp]), (DEEPSEEK, [tp, ep, pp, [*cp, *ep], ring])])


@needs_megatron
@pytest.mark.slow
def test_four_processes_equal_the_native_engine():
    both = [["parallel.tp=2", "parallel.pp=2"], ["parallel.tp=2", "parallel.ep=2"]]
    check(4, [(DEEPSEEK, both), (PLAIN, [["parallel.tp=4", "train.recompute=full"]])])


@needs_megatron
@pytest.mark.slow
def test_a_run_changes_engines_twice(tmp_path, tiny_shards):
    """At the end, losses, weights and moments are those of one that did not."""
    turns = [["train.stop_at=2"], ["train.stop_at=4", "engine=megatron", "parallel.tp=2"], ["parallel.ep=2"]]
    runs = [(tmp_path / "whole", tiny_shards, DEEPSEEK)]
    runs += [(tmp_path / "turns", tiny_shards, [*DEEPSEEK, *turn]) for turn in turns]
    run_ranks(_trainings, 2, runs, timeout=280)
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "whole"), rel=LOSSES)
    found, expected = saved(tmp_path / "turns", 6), saved(tmp_path / "whole", 6)
    check_tensors(found["model"], expected["model"], WEIGHTS, "weights")
    check_tensors(found["optimizer"], expected["optimizer"], MOMENTS, "moments")

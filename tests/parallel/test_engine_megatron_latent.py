"""Multi-head latent attention on the Megatron-Core engine: the native engine's numbers, and resumes from and to it."""

import pytest

from tests.parallel.test_engine_megatron import MIXED, check, needs_megatron

LATENT = [
    "model.kv_heads=0",
    "model.mla.kv_rank=18",
    "model.mla.nope_dim=6",
    "model.mla.rope_dim=4",
    "model.mla.v_dim=5",
]
PLAIN = [*LATENT, "model.mla.q_rank=0", "model.mlp_bias=true", "model.out_bias=true", "model.norm=layer"]
YARN = ["model.rope.scaling=yarn", "model.rope.factor=4.0", "model.rope.mscale_all_dim=0.7", "model.tied=false"]
DEEPSEEK = [*LATENT, "model.mla.q_rank=24", *YARN, *[key for key in MIXED if "shared_gate" not in key]]


@needs_megatron
@pytest.mark.slow
def test_two_processes_equal_the_native_engine():
    """cp: documents are cut anywhere, and may not see each other. Ring: values are narrower than keys."""
    tp, pp, cp = ["parallel.tp=2"], ["parallel.pp=2"], ["parallel.cp=2", "parallel.dp_shard=1"]
    shared, ep = ["parallel.dp_shard=2"], ["parallel.ep=2"]
    ring = [*cp, "parallel.cp_method=ring"]
    check(2, [(PLAIN, [shared, tp, pp, cp]), (DEEPSEEK, [tp, ep, pp, [*cp, *ep], ring])])

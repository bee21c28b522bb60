"""Latent attention: refusals, counts, generation, and layouts that share the sequence. (Logits: test_hf_deepseek.)"""

import pytest
import torch
from torch import nn

from pretrain.config import resolve
from pretrain.models import FAMILIES
from pretrain.models.layers.cache import KVCache
from pretrain.models.layers.rope import Rope, cos_sin, rotate
from tests.parallel.test_tensor import VARIANTS, gradients
from tests.ranks import run_ranks

SMALL = ["model.vocab_size=67", "model.kv_heads=0", "model.layers=2", "model.mla.q_rank=24", "model.mla.kv_rank=20"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kv_heads=2", "model.kv_heads = 2, but model.mla gives each of the 10 heads keys of its own"),
        ("model.head_dim=8", "model.head_dim = 8 has no meaning with model.mla; leave it at 0"),
        ("model.qkv_bias=true", "model.qkv_bias = True has no meaning with model.mla"),
        ("model.qk_norm=head", "model.qk_norm = 'head' has no meaning with model.mla"),
        ("model.positions=learned", "model.positions = 'learned' has no meaning with model.mla"),
        ("model.mla.rope_dim=7", "model.mla.rope_dim = 7 is odd"),
        ("model.mla.v_dim=0", "model.mla.v_dim = 0: must be at least 1"),
        ("model.mla.kv_lora_rank=8", "unknown key model.mla.kv_lora_rank"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(override, message):
    with pytest.raises(ValueError) as error:
        resolve("tiny", [*SMALL, override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_flops_of_scores_and_values_count_each_width():
    """6 FLOPs (forward 2, backward 4) a query, key seen and dim, of [nope | rope] for scores and of v for values."""
    model = resolve("tiny", [*SMALL, "model.mla.nope_dim=10", "model.mla.rope_dim=6", "model.mla.v_dim=7"])[0].model
    seen = sum(range(1, 17)) / 16
    assert model.attention_flops_per_token(16) == pytest.approx(2 * 10 * seen * 6 * (10 + 6 + 7))
    matrices = (
        160 * 24 + 24 * 10 * 16 + 160 * (20 + 6) + 20 * 10 * 17 + 10 * 7 * 160 + 3 * 160 * model.ffn
    )  # q down, q up, kv down, kv up, out, feed-forward
    norms = 24 + 20 + 2 * 160
    assert model.flops_per_token == 6 * (2 * (matrices + norms) + 67 * 160)


def test_widths_need_not_divide():
    config = resolve("tiny", [*SMALL, "model.heads=7", "model.mla.nope_dim=9"])[0].model
    assert FAMILIES["decoder"].build(config) is not None


def test_generation_with_a_cache_gives_the_same_states():
    config = resolve("tiny", [*SMALL, "model.mla.v_dim=12", "model.rope.scaling=yarn", "model.rope.factor=4"])[0].model
    torch.manual_seed(0)
    model = FAMILIES["decoder"].build(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(67, (2, 12))
    cache = KVCache()
    with torch.inference_mode():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_neighbouring_pairs_are_half_split_pairs_in_another_order():
    x = torch.randn(2, 5, 3, 8)
    cos, sin = cos_sin(Rope(), torch.arange(5)[None], 8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(rotate(x, cos, sin, neighbours=True), rotate(x[..., order], cos, sin))


@pytest.mark.parametrize("layout", [["cp=2"], ["cp=2", "cp_method=ring"], ["cp=2", "tp=2"], ["dp_shard=2"]], ids=str)
@pytest.mark.parametrize("variant", ["deepseek", "deepseek-lite"])
def test_equals_one_process(variant, layout):
    expected = gradients(VARIANTS[variant])
    overrides = [f"parallel.{setting}" for setting in layout]
    for found in run_ranks(gradients, 4 if "tp=2" in layout else 2, [*VARIANTS[variant], *overrides]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-10 * value.abs().max() + 1e-13, name

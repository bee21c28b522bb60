"""Recipes, overrides, provenance, and what wrong ones are answered with."""

import json
import re

import pytest

from pretrain.config import (
    explain_origins,
    load_run_config,
    recipe_names,
    recipe_schema,
    resolve,
    write_config,
)
from pretrain.models import FAMILIES

PUBLISHED_PARAMETERS = {
    "gpt2": 124_439_808,
    "llama2-7b": 6_738_415_616,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "olmo2-7b": 7_298_617_344,
    "gemma3-1b": 999_885_952,
    "smollm3-3b": 3_075_098_624,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "bench-12m": 12_587_904,
    "deepseek-v3": 671_026_404_352,  # files hold 58 x 256 numbers more: the routers' biases, no parameters
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name, tmp_path):
    config, _ = resolve(name)
    write_config(config, tmp_path / "config.toml")
    assert load_run_config(tmp_path) == config
    if name in PUBLISHED_PARAMETERS:
        assert config.model.num_parameters() == PUBLISHED_PARAMETERS[name]


def test_overrides_win_over_recipe_over_base_and_say_so(tmp_path):
    (tmp_path / "base.toml").write_text("[train]\nsteps = 50\nmicro_batch = 2\nglobal_batch = 4\n")
    (tmp_path / "mine.toml").write_text('base = "base"\n[train]\nsteps = 60\n[optim]\nlr = 1e-3\n')
    config, origins = resolve(str(tmp_path / "mine.toml"), ["optim.lr=2e-3", "run.dir=runs/with space"])
    assert (config.train.steps, config.train.micro_batch, config.optim.lr) == (60, 2, 2e-3)
    assert config.run.dir == "runs/with space"
    origin = {key: where for key, _, where in explain_origins(config, origins)}
    assert origin["train.steps"] == "recipe mine.toml"
    assert origin["train.micro_batch"] == "recipe base.toml"
    assert origin["optim.lr"] == "override optim.lr=2e-3"
    assert origin["optim.betas"] == "default"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz (did you mean train.steps?)"),
        ("steps=3", "unknown key steps (did you mean train.steps?)"),
        ("model.rope.thetta=1", "unknown key model.rope.thetta (did you mean model.rope.theta?)"),
        ("train.steps=many", "train.steps = 'many': input should be a valid integer"),
        ("model.heads=7", "model.hidden = 160 is not divisible by model.heads = 7"),
        ("model.kv_heads=3", "model.heads = 10 is not divisible by model.kv_heads = 3"),
        ("data.seq_len=4096", "data.seq_len = 4096 is longer than model.max_seq_len = 1024"),
        ("train.micro_batch=3", "train.global_batch = 16 is not a multiple of train.micro_batch = 3"),
        ("engine=jax", "engine = 'jax' is unknown: one of torch"),
        ("eval.every=5", "eval.every is set but eval.shards is empty"),
        ("model.window=128", "model.window is set, but no layer is sliding"),
        ("model.rope.factor=4", "model.rope.factor = 4.0, but model.rope.scaling is none"),
        ("model.rope.theta=-1", "rope.theta = -1"),
        ("model.rope.mscale_all_dim=1", "model.rope.mscale_all_dim = 1.0 scales the scores of latent attention"),
        ("optim.lr=inf", "optim.lr = inf: input should be a finite number"),
        ("train.stop_at=300", "train.stop_at = 300 is past the end"),
        ("train", "write it as key=value"),
        ("run.dir.deeper=1", "'dir' is a value, not a section"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        resolve("tiny", [override])
    assert "\n" not in str(error.value)


def test_pictures_that_see_both_ways_need_the_mask_of_documents():
    resolve("tiny-vlm-free", ["objective.document_mask=false", "objective.image_attention=causal"])
    resolve("tiny", ["objective.document_mask=false", "objective.image_attention=both"])
    with pytest.raises(ValueError, match=r"objective\.document_mask = false leaves no mask for .*\"both\"") as error:
        resolve("tiny-vlm-free", ["objective.document_mask=false"])
    assert "\n" not in str(error.value)


def test_a_wrong_recipe_name_or_file_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean tiny"):
        resolve("tinny")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml: no such file"):
        resolve("nowhere.toml")
    (tmp_path / "torn.toml").write_text("[train\nsteps = 1\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        resolve(str(tmp_path / "torn.toml"))
    (tmp_path / "a.toml").write_text('base = "b"\n')
    (tmp_path / "b.toml").write_text('base = "a"\n')
    with pytest.raises(ValueError, match=r"circle: a\.toml -> b\.toml -> a\.toml"):
        resolve(str(tmp_path / "a.toml"))


def test_config_is_frozen():
    config, _ = resolve("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5


def test_schema_describes_every_key():
    schema = recipe_schema()
    assert "base" in schema["properties"]
    json.dumps(schema)
    for name, section in schema["$defs"].items():
        if name not in ("Rope", "MoE", "MLA"):  # plain dataclasses of the layers; described in their source
            for key, field in section["properties"].items():
                assert field.get("description"), f"{name}.{key} has no description"


def test_families_count_their_parameters():
    """`num_parameters`, which planning relies on, against the modules themselves."""
    import torch

    for overrides in (
        [],
        ["model.norm=layer", "model.positions=learned", "model.gated=false", "model.mlp_bias=true"],
        ["model.norm_position=both", "model.qk_norm=full", "model.qkv_bias=true", "model.out_bias=true"],
        ["model.qk_norm=head", "model.tied=false", "model.head_dim=64"],
        ["model.kv_heads=0", "model.mla.q_rank=24", "model.mla.kv_rank=20", "model.out_bias=true", "model.norm=layer"],
        [
            "model.kv_heads=0",
            "model.mla.q_rank=0",
            "model.mla.nope_dim=10",
            "model.mla.rope_dim=6",
            "model.mla.v_dim=7",
        ],
    ):
        config, _ = resolve("tiny", ["model.vocab_size=100", *overrides])
        with torch.device("meta"):
            model = FAMILIES["decoder"].build(config.model)
        assert config.model.num_parameters() == sum(p.numel() for p in model.parameters())

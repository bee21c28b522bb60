"""DeepSeek-V3: Hugging Face -> run -> Hugging Face, and our own models under its brand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints.hf.brand import choose_brand
from checkpoints.hf.folder import read_config
from checkpoints.store import CheckpointStore
from launch.commands.convert import native_tensors
from pretrain.config import validate, write_config
from pretrain.load import load_trained
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import BRANDS
from tests.checkpoints.hf.tiny import TOKEN_IDS, VOCAB, YARN, Case, checkpoint_command, make_model, rope
from tests.pretrain.models.decoder.test_hf import config_of, tensors_of

SIZES: dict[str, Any] = TOKEN_IDS | {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 76, "moe_intermediate_size": 20,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 6, "n_shared_experts": 2,
    "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "kv_lora_rank": 22, "q_lora_rank": 26, "qk_rope_head_dim": 8, "v_head_dim": 7, "qk_nope_head_dim": 10,
    "max_position_embeddings": 128, "num_mtp_layers": 0,
}  # fmt: skip
CASES = {
    "v3": SIZES | rope(YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "mscales differ": SIZES | rope(YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}) | {"rms_norm_eps": 1e-3},
    "no query latent": SIZES | rope(YARN) | {"q_lora_rank": None, "first_k_dense_replace": 0},
    "one group": SIZES | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
}


def save(name: str, folder: Path) -> Any:
    """A model of which everything is random, the biases that choose too."""
    model = make_model(Case("deepseek_v3", CASES[name]))
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.uniform_(-1.5, 0.5)  # with a score of 0 to 1: of either sign
    model.save_pretrained(folder)
    return model


def logits_agree(run: Path, folder: Path) -> None:
    native = load_trained(run).model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = native.logits(native(tokens)), model(tokens, use_cache=False).logits
    assert theirs.std() > 0.3  # else the next line would prove nothing
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, run, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    save(name, theirs)
    assert checkpoint_command("import", theirs, run) == 0
    logits_agree(run, theirs)
    assert checkpoint_command("export", run, back) == 0
    before, after = tensors_of(theirs), tensors_of(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert config_of(theirs) == config_of(back)


NATIVE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden": 52, "layers": 4, "ffn": 76, "heads": 3, "max_seq_len": 64,
    "mla": {"q_rank": 22, "kv_rank": 18, "nope_dim": 9, "rope_dim": 6, "v_dim": 11},
    "moe": {
        "experts": 8, "top_k": 2, "ffn": 12, "shared_ffn": 24, "first_dense": 2, "scores": "sigmoid", "bias": True,
    },
}  # fmt: skip


def save_run(model: dict[str, Any], run: Path) -> dict[str, torch.Tensor]:
    config = validate({"run": {"dir": "x"}, "model": model, "data": {"seq_len": 32}}, "test")
    run.mkdir()
    write_config(config, run / "config.toml")
    shapes, ties = native_tensors(config.model)
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    CheckpointStore(run / "checkpoints").save(3, tensors, {}, {}, ties=ties)
    return tensors


def test_a_native_model_exports_and_its_choosing_bias_stays_fp32(tmp_path: Path) -> None:
    tensors = save_run(NATIVE, tmp_path / "run")
    assert checkpoint_command("export", tmp_path / "run", tmp_path / "out", "--dtype", "bf16") == 0
    written = tensors_of(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "deepseek_v3"
    assert written["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16
    bias = written["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, tensors["layers.3.moe.routing.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": NATIVE["moe"] | {"scores": "softmax"}}, "model.moe.scores = 'softmax' (allowed: 'sigmoid')"),
        ({"moe": NATIVE["moe"] | {"bias": False}}, "model.moe.bias = False (allowed: True)"),
        ({"moe": NATIVE["moe"] | {"shared_ffn": 20}}, "model.moe.shared_ffn = 20 (allowed: 'multiples of"),
        ({"moe": NATIVE["moe"] | {"groups": 2}}, "model.moe.group_score = 'max' (allowed: 'top2')"),
        ({"moe": None}, "model.moe = None"),
        ({"out_bias": True}, "model.out_bias = True"),
    ],
)
def test_what_it_cannot_express_is_named(change: dict[str, Any], message: str) -> None:
    config = DecoderConfig(**(NATIVE | change)).model_dump(mode="json")
    with pytest.raises(ValueError, match="deepseek_v3 cannot express") as error:
        choose_brand(BRANDS, config, "deepseek_v3")
    assert message in str(error.value)


def test_layers_of_multi_token_prediction_are_left_out_and_no_others(tmp_path: Path) -> None:
    save("v3", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(48, 96),
        "model.layers.3.shared_head.norm.weight": torch.ones(48),
    }
    save_file(tensors | extra, file, {"format": "pt"})
    assert checkpoint_command("import", tmp_path / "hf", tmp_path / "run") == 0
    save_file(tensors | {"model.layers.4.enorm.weight": torch.ones(48)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has the tensor 'model\.layers\.4\.enorm\.weight'"):
        checkpoint_command("import", tmp_path / "hf", tmp_path / "other")


def test_an_expert_that_is_missing_or_one_too_many_is_named(tmp_path: Path) -> None:
    save("v3", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    last = "model.layers.2.mlp.experts.11.up_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != last}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the tensor '{last}'"):
        checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    save_file(tensors | {last.replace("11", "12"): tensors[last].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has the tensor '{last.replace('11', '12')}'"):
        checkpoint_command("import", tmp_path / "hf", tmp_path / "run")


PUBLISHED = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "ep_size": 1,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "moe_layer_freq": 1, "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "hidden_act": "silu", "max_position_embeddings": 163840, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "attention_bias": False, "tie_word_embeddings": False,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def test_the_published_config_is_understood(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    brand, native, _ = read_config(tmp_path, BRANDS)
    config = DecoderConfig(**native)
    shapes, _ = native_tensors(config)
    biases = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.endswith("routing.bias"))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.num_parameters() + biases
    assert config.num_parameters() + biases == 671_026_419_200
    assert config.rope.score_factor == pytest.approx(1.8738542070926265) and config.rope.amplitude == 1
    assert config.moe is not None and config.moe.group_score == "top2"
    assert choose_brand(BRANDS, config.model_dump(mode="json"), None) == brand

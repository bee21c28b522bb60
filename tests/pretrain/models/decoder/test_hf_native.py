"""Models that never were Hugging Face's: configs with our defaults left alone, under each brand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.hf.brand import choose_brand
from checkpoints.hf.folder import read_config
from checkpoints.store import CheckpointStore
from launch.commands.convert import native_tensors
from pretrain.config import validate, write_config
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import BRANDS
from tests.checkpoints.hf.tiny import VOCAB, checkpoint_command

SLIDING: dict[str, Any] = {"pattern": ["sliding", "full", "full"], "window": 6}
GPT2 = {"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"}
GPT2 |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
NATIVE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"pattern": ["sliding"], "window": 6},
    "qwen2": {"qkv_bias": True, **SLIDING},
    "qwen3": {"qk_norm": "head", **SLIDING},
    "olmo2": {"qk_norm": "full", "norm_position": "post"},
    "gemma3_text": {
        "qk_norm": "head", "norm_position": "both", "norm": "rms_unit", "embedding_scale": 48**0.5, **SLIDING,
    },
    "smollm3": {"pattern": ["nope", "full"]},
    "gpt2": GPT2,
}  # fmt: skip


@pytest.mark.parametrize("brand", NATIVE)
def test_a_native_config_exports_under_its_brand(brand: str, tmp_path: Path) -> None:
    """head_dim and kv_heads stay 0, rope_local unset: what transformers puts in for a missing key must not show."""
    model = {"vocab_size": VOCAB, "hidden": 48, "layers": 3, "ffn": 76, "heads": 6, "max_seq_len": 64} | NATIVE[brand]
    config = validate({"run": {"dir": "x"}, "model": model, "data": {"seq_len": 32}}, "test")
    run = tmp_path / "run"
    run.mkdir()
    write_config(config, run / "config.toml")
    shapes, ties = native_tensors(config.model)
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    CheckpointStore(run / "checkpoints").save(3, tensors, {}, {}, ties=ties)
    assert checkpoint_command("export", run, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == brand


def llama(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-5}
    return {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False} | sizes | more


PUBLISHED = {  # config.json as published, with the number of parameters that its page or paper gives
    "Llama-2-7b": (
        llama(vocab_size=32000, intermediate_size=11008, max_position_embeddings=4096, rope_scaling=None),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        llama(
            vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
            rope_theta=500000.0, eos_token_id=[128001, 128008, 128009],
            rope_scaling={
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192,
            },
        ),
        8_030_261_248,
    ),
    "Mistral-7B-v0.1": (
        llama(
            model_type="mistral", vocab_size=32000, intermediate_size=14336, num_key_value_heads=8,
            max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096,
        ),
        7_241_732_096,
    ),
    "Qwen2-0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072, "max_window_layers": 24, "rope_theta": 1e6, "sliding_window": 131072,
            "use_sliding_window": False, "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "max_window_layers": 28, "rope_theta": 1000000,
            "use_sliding_window": False, "sliding_window": None, "attention_bias": False, "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "OLMo-2-1124-7B": (
        llama(
            model_type="olmo2", vocab_size=100352, intermediate_size=11008, max_position_embeddings=4096,
            rms_norm_eps=1e-6, rope_theta=500000, pad_token_id=100277, eos_token_id=100257,
        ),
        7_298_617_344,
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 26,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1000000, "rope_local_base_freq": 10000,
            "sliding_window": 512, "sliding_window_pattern": 6, "cache_implementation": "hybrid",
        },
        999_885_952,
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
            "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 36, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 65536, "no_rope_layers": [1, 1, 1, 0] * 9, "rope_theta": 5e6,
            "use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 36,
        },
        3_075_098_624,
    ),
    "gpt2": (
        {
            "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
            "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        },
        124_439_808,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name: str, tmp_path: Path) -> None:
    published, num_parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    brand, native, _ = read_config(tmp_path, BRANDS)
    config = DecoderConfig(**native)
    shapes, _ = native_tensors(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.num_parameters() == num_parameters
    assert choose_brand(BRANDS, config.model_dump(mode="json"), None) == brand


def test_layers_and_rotations_of_published_configs(tmp_path: Path) -> None:
    def native(name: str) -> DecoderConfig:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
        return DecoderConfig(**read_config(tmp_path, BRANDS)[1])

    gemma = native("gemma-3-1b")
    assert [gemma.layer_kind(index) for index in (0, 4, 5, 6, 11)] == ["sliding", "sliding", "full", "sliding", "full"]
    assert gemma.rope_local is not None and (gemma.rope.theta, gemma.rope_local.theta) == (1e6, 1e4)
    assert gemma.tied and gemma.window == 512
    assert native("SmolLM3-3B").pattern == ("full", "full", "full", "nope")
    assert native("Qwen2-0.5B").pattern == ("full",) and native("Mistral-7B-v0.1").pattern == ("sliding",)
    rope = native("Llama-3.1-8B").rope
    assert (rope.scaling, rope.theta, rope.factor, rope.original_max_seq_len) == ("llama3", 5e5, 8.0, 8192)

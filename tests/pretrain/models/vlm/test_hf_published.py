"""Published models, by their config.json and the number of parameters that their pages give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from checkpoints.hf.folder import read_config
from launch.commands.convert import native_tensors
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.hf import BRANDS

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "llava-1.5-7b-hf": (
        {
            "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "tie_word_embeddings": False, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "vocab_size": 32064, "ignore_index": -100,
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "float16", "vocab_size": 32064,
            },
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                "vocab_size": 32000,
            },
        },
        {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"shortest_edge": 336}, "resample": 3},
        7_063_427_072,
    ),
    "fuyu-8b": (
        {
            "model_type": "fuyu", "hidden_act": "relu2", "hidden_dropout": 0.0, "hidden_size": 4096, "image_size": 300,
            "intermediate_size": 16384, "layer_norm_eps": 1e-5, "max_position_embeddings": 16384, "patch_size": 30,
            "num_attention_heads": 64, "num_channels": 3, "num_hidden_layers": 36, "partial_rotary_factor": 0.5,
            "qk_layernorm": True, "rope_scaling": None, "rope_theta": 25000.0, "tie_word_embeddings": False,
            "vocab_size": 262144, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
        },
        {"image_mean": 0.5, "image_std": 0.5, "image_processor_type": "FuyuImageProcessor", "padding_value": 1.0},
        9_408_238_592,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read(name: str, tmp_path: Path) -> None:
    config, images, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    brand, native, _ = read_config(tmp_path, BRANDS)
    model = VLMConfig(**native)
    shapes, _ = native_tensors(model)
    assert sum(map(math.prod, shapes.values())) == parameters == model.num_parameters()
    again = brand.to_hf(model.model_dump(mode="json"))
    if name.startswith("llava"):
        assert (again["image_seq_length"], brand.patches(native)) == (576, 577)
    else:
        assert again["text_config"]["rope_parameters"]["rope_theta"] == 25000.0
        assert model.patches.mean == (0.5, 0.5, 0.5) and model.rotary_dim == 32

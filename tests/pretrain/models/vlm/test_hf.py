"""LLaVA: Hugging Face -> run -> Hugging Face, equal by logits with pictures, by every tensor's bits and by config."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from checkpoints.hf.brand import choose_brand
from checkpoints.hf.ops import View
from checkpoints.hf.verify import NotEqual
from pretrain.load import load_trained
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.hf import BRANDS
from pretrain.models.vlm.hf_tower import convolution
from tests.checkpoints.hf.tiny import TOKEN_IDS
from tests.pretrain.models.vlm.tiny_hf import IMAGE_TOKEN, MEAN, STD, VOCAB, export_run, import_run, probe_of, save_hf

TOWER = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 20}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "layer_norm_eps": 1e-4, "vision_use_head": False}
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
} | TOKEN_IDS  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT, "head_dim": 10}
QWEN2 = {"model_type": "qwen2", **TEXT, "max_window_layers": 3}
LLAVA = {"model_type": "llava", "image_token_index": IMAGE_TOKEN, "image_seq_length": 9}
CASES: dict[str, dict[str, Any]] = {
    "clip-llama": LLAVA | {"vision_config": CLIP, "text_config": LLAMA},
    "clip-qwen2": LLAVA
    | {"vision_config": CLIP | {"hidden_act": "gelu"}, "text_config": QWEN2, "vision_feature_layer": -3}
    | {"projector_hidden_act": "gelu_pytorch_tanh", "multimodal_projector_bias": False},
    "siglip-qwen2": LLAVA
    | {"vision_config": SIGLIP, "text_config": QWEN2 | {"tie_word_embeddings": True}, "vision_feature_layer": -2}
    | {"vision_feature_select_strategy": "full"},
    "siglip-last": LLAVA
    | {"vision_config": SIGLIP, "text_config": QWEN2, "vision_feature_layer": -1}
    | {"vision_feature_select_strategy": "full"},
    "clip-last": LLAVA | {"vision_config": CLIP, "text_config": LLAMA, "vision_feature_layer": -1},
    "siglip-normed": LLAVA
    | {"vision_config": SIGLIP | {"tie_last_hidden_states": True}, "text_config": LLAMA, "vision_feature_layer": -1}
    | {"vision_feature_select_strategy": "full"},
}


def config_of(folder: Path) -> dict[str, Any]:
    return {key: v for key, v in AutoConfig.from_pretrained(folder).to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, run, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    model = save_hf(CASES[name], theirs)
    import_run(theirs, run)

    native = load_trained(run)
    assert native.config.model.patches.mean == tuple(MEAN) and native.config.model.patches.std == tuple(STD)
    probe = probe_of(native)
    assert (probe.native["slots"] >= 0).sum() == 18
    with torch.inference_mode():
        ours = native.model.logits(native.model(probe.tokens, **probe.native))
        expected = model(input_ids=probe.tokens, **probe.hf).logits
        blind = native.model.logits(native.model(probe.tokens))
    assert (blind - expected).abs().max() > 0.1  # else the next line would prove nothing
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    export_run(run, back)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert config_of(theirs) == config_of(back)
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (theirs, back)]
    assert generation[0] == generation[1]


def test_published_names_of_the_tower_are_understood(tmp_path: Path) -> None:
    """Files on the hub were written by transformers 4, with a buffer and a module more."""
    theirs, run = tmp_path / "hf", tmp_path / "run"
    save_hf(CASES["clip-llama"], theirs)
    before = load_file(theirs / "model.safetensors")
    old = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in before.items()}
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(old, theirs / "model.safetensors", {"format": "pt"})
    import_run(theirs, run)
    export_run(run, tmp_path / "back")
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_head_that_pools_and_a_layer_counted_from_the_front(tmp_path: Path) -> None:
    case = CASES["siglip-qwen2"] | {"vision_config": SIGLIP | {"vision_use_head": True}, "vision_feature_layer": 1}
    model, run, back = save_hf(case, tmp_path / "hf"), tmp_path / "run", tmp_path / "back"
    assert any("head.probe" in name for name, _ in model.named_parameters())
    import_run(tmp_path / "hf", run)
    export_run(run, back)
    config = config_of(back)
    assert config["vision_feature_layer"] == -4 and config["vision_config"]["vision_use_head"] is False
    probe = probe_of(load_trained(run))
    with torch.inference_mode():
        again = type(model).from_pretrained(back)(input_ids=probe.tokens, **probe.hf).logits
        torch.testing.assert_close(again, model(input_ids=probe.tokens, **probe.hf).logits, rtol=0, atol=1e-5)


def test_pixels_past_the_last_whole_patch(tmp_path: Path) -> None:
    """SigLIP so400m: 384 pixels, patches of 14."""
    case = CASES["siglip-qwen2"] | {"vision_config": SIGLIP | {"image_size": 29}}
    save_hf(case, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    assert load_trained(tmp_path / "run").config.model.vision.grid == (3, 3)
    export_run(tmp_path / "run", tmp_path / "back")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer = [-2, -3] (allowed: 'one number')"),
        ({"vision_feature_layer": 0}, "vision_feature_layer = 0 (allowed: '-4 to -1')"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' (allowed: 'default')"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act = 'mish'"),
        ({"vision_config": CLIP | {"num_channels": 1}}, "vision_config.num_channels = 1 (allowed: 3)"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type = 'pixtral' (allowed: 'clip_vision"),
        ({"text_config": LLAMA | {"hidden_act": "mish"}}, "text_config.hidden_act = 'mish'"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type = 'gpt2' (allowed: 'llama', 'qwen2'"),
    ],
)
def test_what_we_lack_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_hf(CASES["clip-llama"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | change
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        import_run(tmp_path / "hf", tmp_path / "run")
    assert message in str(caught.value) and str(tmp_path / "hf") in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_of_unknown_mean_are_refused(tmp_path: Path) -> None:
    save_hf(CASES["clip-llama"], tmp_path / "hf")
    images = tmp_path / "hf/preprocessor_config.json"
    images.write_text(json.dumps(json.loads(images.read_text()) | {"do_rescale": False}))
    with pytest.raises(ValueError, match=r"image_processor.do_rescale = False \(allowed: True\)"):
        import_run(tmp_path / "hf", tmp_path / "run")
    images.unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing beside it"):
        import_run(tmp_path / "hf", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": None}, "model.vision = None"),
        ({"connector": {"kind": "linear"}}, "model.connector.kind = 'linear' (allowed: 'mlp')"),
        ({"connector": {"merge": 2}}, "model.connector.merge = 2"),
        ({"vision": {"grid": [2, 3]}}, "model.vision.grid = [2, 3] (allowed: [2, 2], [3, 3])"),
        ({"vision": {"positions": "rope"}}, "model.positions = 'rope'"),
        ({"vision": {"class_token": True, "first_norm": True, "patch_bias": False}}, "final_norm = True"),
        ({"norm": "layer"}, "llama cannot express model.norm = 'layer'"),
    ],
)
def test_what_llava_lacks_is_named(change: dict[str, Any], message: str) -> None:
    config = VLMConfig(vocab_size=VOCAB, **({"vision": {}} | change)).model_dump(mode="json")
    with pytest.raises(ValueError, match="llava cannot express") as caught:
        choose_brand({"llava": BRANDS["llava"]}, config, "llava")
    assert message in str(caught.value) and "\n" not in str(caught.value)


class UpsideDown(View):
    """The bug of a converter that takes a patch as (channel, x, y): reversible, so that tensors alone look right."""

    def to_hf(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [super().to_hf(tensors)[0].transpose(2, 3).contiguous()]

    def to_native(self, tensors: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        return super().to_native([tensors[0].transpose(2, 3)], shapes)


def test_a_bug_in_the_tower_is_found_by_the_proof_with_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    save_hf(CASES["clip-llama"], tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    wrong = UpsideDown("vision.patch_embed.weight", "vision_tower.embeddings.patch_embedding.weight", convolution)
    rows = tuple(wrong if row.native == wrong.native else row for row in BRANDS["llava"].tensors)
    monkeypatch.setitem(BRANDS, "llava", replace(BRANDS["llava"], tensors=rows))
    with pytest.raises(NotEqual, match=r"logits differ by .*; the embedding differs already"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""CLIP and SigLIP: Hugging Face -> native -> Hugging Face, by features, logits, every tensor's bits and config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

from checkpoints.hf import convert
from checkpoints.hf.brand import choose_brand
from launch.commands.convert import prove_outputs
from pretrain.config import override_config, write_config
from pretrain.load import load_trained
from pretrain.models.dual.config import DualConfig
from pretrain.models.dual.hf import BRANDS, POSITION_IDS
from pretrain.models.vlm.model import Pictures
from tests.checkpoints.hf.tiny import checkpoint_command

VOCAB, LENGTH, SIDE, PATCH, EOS = 71, 13, 15, 3, 70
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 44}
TEXT |= {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": EOS, "bos_token_id": 69}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
CASES: dict[str, dict[str, Any]] = {
    "clip": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 20, "logit_scale_init_value": 2.6592},
    # Published before transformers mended the id: texts are pooled at the largest one.
    "clip-eos-2": {
        "text_config": TEXT | {"eos_token_id": 2, "hidden_act": "gelu"},
        "vision_config": VISION | {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
        "projection_dim": 36,
    },
    "siglip": {"text_config": TEXT | {"projection_size": 32}, "vision_config": VISION},
    "siglip-uneven": {  # 16 pixels are 5 patches of 3
        "text_config": TEXT | {"projection_size": 32, "hidden_act": "gelu"},
        "vision_config": VISION | {"image_size": 16},
    },
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def save_model(name: str, folder: Path) -> Path:
    """A model whose every parameter is random, and the processor's file as published models have it."""
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(AutoConfig.for_model(name.split("-")[0], **CASES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.add_(2.0)
    model.save_pretrained(folder)
    processor = {"image_mean": MEAN, "image_std": STD, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if "eos-2" in name:
        weights, places = folder / "model.safetensors", {key: torch.arange(9)[None] for key in POSITION_IDS}
        save_file(load_file(weights) | places, weights, {"format": "pt"})
    return folder


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, side, side] of bytes, tokens [B, S] and lengths [B], the last token of each text the highest."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(3, 60, (4, LENGTH), generator=generator)
    lengths = torch.tensor([13, 5, 9, 1])
    for row, length in enumerate(lengths.tolist()):
        tokens[row, length - 1] = EOS
        tokens[row, length:] = 1
    return pictures, tokens, lengths


def cut(pictures: Tensor, class_slot: bool) -> Pictures:
    """Bytes [B, 3, side, side] -> rows of patches."""
    count = SIDE // PATCH
    tiles = pictures.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, rows, columns, y, x]
    patches = tiles.permute(0, 2, 3, 1, 4, 5).reshape(len(pictures), count**2, -1)
    grid = torch.stack(torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"), -1).reshape(-1, 2)
    if class_slot:
        patches = torch.cat((torch.zeros_like(patches[:, :1]), patches), dim=1)
        grid = torch.cat((torch.tensor([[-1, -1]]), grid))
    images = torch.zeros(patches.shape[:2], dtype=torch.int32)
    return Pictures.packed(patches, images, grid.expand(len(pictures), -1, -1).contiguous())


def save_tokenizer(folder: Path, end: int) -> None:
    """One of words, whose token `end` ends a text."""
    words = {f"w{index}": index for index in range(VOCAB) if index != end} | {"<end>": end}
    fast = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(WordLevel(words, "w0")), eos_token="<end>")
    fast.save_pretrained(folder)


@torch.inference_mode()
def native_outputs(model: Any, pictures: Tensor, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    images = model.encode_images(cut(pictures, model.cfg.vision.class_token))
    texts = model.encode_texts(tokens, lengths)
    scale, bias = model.temperature(images)
    return {"image_embeds": images, "text_embeds": texts, "logits_per_image": images @ texts.T * scale + bias}


def normal(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures / 255 - mean) / std


@torch.inference_mode()
def hf_outputs(folder: Path, pictures: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    out = model(input_ids=tokens, pixel_values=normal(pictures))
    return {key: out[key] for key in ("image_embeds", "text_embeds", "logits_per_image")}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, back = save_model(name, tmp_path / "hf"), tmp_path / "back"
    assert checkpoint_command("import", theirs, tmp_path / "run") == 0
    trained = load_trained(tmp_path / "run")
    model, config = trained.model, trained.config.model
    assert trained.config.data.patches == 25 + config.vision.class_token
    assert trained.config.objective.loss == ("sigmoid" if name.startswith("siglip") else "softmax")
    assert config.patches.mean == tuple(MEAN) and config.patches.std == tuple(STD)
    assert trained.config.data.pictures.resize == ("squash" if name.startswith("siglip") else "crop")
    pictures, tokens, lengths = inputs()
    ours, expected = native_outputs(model, pictures, tokens, lengths), hf_outputs(theirs, pictures, tokens)
    assert expected["logits_per_image"].std() > 0.1  # else the next lines would prove nothing
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-4, msg=key)

    assert checkpoint_command("export", tmp_path / "run", back) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    for key in POSITION_IDS:  # of old files; nobody needs them
        before.pop(key, None)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.shape == after[key].shape and torch.equal(tensor, after[key]), key
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, back)]
    for read in configs:
        del read["_name_or_path"]
    if name == "siglip-uneven":
        assert configs[1]["vision_config"].pop("image_size") == 15
        assert configs[0]["vision_config"].pop("image_size") == 16
    assert configs[0] == configs[1]
    for key, value in hf_outputs(back, pictures, tokens).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(("name", "resize"), [("clip", "crop"), ("siglip", "squash"), ("siglip", "crop")])
def test_a_model_of_our_own_has_a_brand_and_its_processor(name: str, resize: str, tmp_path: Path) -> None:
    """Nothing is kept of an import; the tokenizer says which token ends a text, the run what became of pictures."""
    run = tmp_path / "run"
    checkpoint_command("import", save_model(name, tmp_path / "hf"), run)
    write_config(override_config(run, [f"data.pictures.resize={resize}"]), run / "config.toml")
    (run / "huggingface.json").unlink()
    save_tokenizer(run / "tokenizer", end=EOS)
    assert checkpoint_command("export", run, tmp_path / "own") == 0
    written = json.loads((tmp_path / "own" / "processor_config.json").read_text())["image_processor"]
    assert written["image_mean"] == MEAN and written["image_std"] == STD and written["do_normalize"]
    assert ("crop_size" in written) == (resize == "crop")
    assert written.get("crop_size", written["size"]) == {"height": SIDE, "width": SIDE}
    pictures = inputs()[0]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "own")
    seen = processor(images=[Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures], return_tensors="pt")
    torch.testing.assert_close(seen["pixel_values"], normal(pictures), rtol=0, atol=1e-5)
    config: Any = AutoConfig.from_pretrained(tmp_path / "own")
    assert config.model_type == name and config.text_config.eos_token_id == EOS


@pytest.mark.parametrize(("end", "message"), [(2, "an end-of-text token of 2 means something else"), (None, "none is")])
def test_clip_needs_to_know_what_ends_a_text(end: int | None, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint_command("import", save_model("clip", tmp_path / "hf"), run)
    (run / "huggingface.json").unlink()
    if end is not None:
        save_tokenizer(run / "tokenizer", end)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint_command("export", run, tmp_path / "own")
    assert "\n" not in str(caught.value) and not (tmp_path / "own").exists()


def test_a_tower_that_differs_is_named(tmp_path: Path) -> None:
    """A first norm that a table forgot would leave texts alone."""
    theirs, run = save_model("clip", tmp_path / "hf"), tmp_path / "run"
    checkpoint_command("import", theirs, run)
    config, brand = load_trained(run).config.model, BRANDS["clip"]
    tensors = load_file(theirs / "model.safetensors")
    tensors["vision_model.pre_layrnorm.weight"] += 0.01
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="features of images differ by"):
        prove_outputs(theirs, config, run / "checkpoints" / "step-00000000", brand, None)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", {"vision_config": VISION | {"num_channels": 1}}, "vision_config.num_channels = 1 (allowed: 3)"),
        ("clip", {"vision_config": VISION | {"hidden_act": "mish"}}, "vision_config.hidden_act = 'mish'"),
        ("clip", {"vision_config": VISION | {"image_size": [15, 18]}}, "vision_config.image_size = [15, 18]"),
        ("siglip", {"vision_config": VISION | {"vision_use_head": False}}, "vision_config.vision_use_head = False"),
    ],
)
def test_config_features_we_lack_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    AutoConfig.for_model(name, **{**CASES[name], **change}).save_pretrained(folder)
    with pytest.raises(ValueError) as caught:
        convert.look_at(folder, BRANDS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"image_pool": "mean", "vision": {"class_token": False}}, "model.image_pool = 'mean'"),
        ({"vision": {"grid": [3, 5]}}, "model.vision.grid = [3, 5]"),
        ({"norm": "rms"}, "model.norm = 'rms'"),
    ],
)
def test_what_no_brand_expresses_says_why(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    theirs = save_model("clip", tmp_path / "hf")
    native = DualConfig.model_validate(convert.look_at(theirs, BRANDS).config).model_dump(mode="json")
    with pytest.raises(ValueError, match="no Hugging Face architecture expresses this model") as caught:
        choose_brand(BRANDS, {**native, **change, "vision": native["vision"] | change.get("vision", {})}, None)
    assert key in str(caught.value) and "\n" not in str(caught.value)

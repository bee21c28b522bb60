"""ViT: Hugging Face -> native -> Hugging Face, by logits, every tensor's bits, config, and from a PNG file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTModel

from checkpoints.hf import convert
from checkpoints.hf.brand import choose_brand
from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.labels import LabelStream, as_tokenizer
from data_pipeline.loader import to_torch
from launch.commands.convert import prove_outputs
from pretrain.data import picture_form
from pretrain.load import load_trained
from pretrain.models.vit.config import ViTConfig
from pretrain.models.vit.hf import BRANDS
from pretrain.objectives.classification import ClassificationConfig, ClassificationObjective
from tests.checkpoints.hf.tiny import checkpoint_command
from tests.data_pipeline.images import encoded, picture, write_tar

SIDE, PATCH = 15, 3
OPTIONS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
OPTIONS |= {"intermediate_size": 44, "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-5}
NAMES = ["lynx", "crane", "tabby cat", "crane", "ox"]  # ImageNet has two cranes
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
CASES: dict[str, dict[str, Any]] = {
    "named": OPTIONS | LABELS,
    "unnamed": OPTIONS | {"hidden_act": "gelu_pytorch_tanh", "num_labels": 7, "hidden_dropout_prob": 0.1},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def save_model(name: str, folder: Path, **more: Any) -> Path:
    """A model whose every parameter is random, and the processor's file as published models have it."""
    torch.manual_seed(0)
    model: Any = AutoModelForImageClassification.from_config(AutoConfig.for_model("vit", **CASES[name], **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    about = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


@torch.inference_mode()
def hf_logits(folder: Path, pixels: Tensor) -> Tensor:
    model: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = model(pixel_values=pixels).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs, back = save_model(name, tmp_path / "hf"), tmp_path / "back"
    assert checkpoint_command("import", theirs, tmp_path / "run") == 0
    config = load_trained(tmp_path / "run").config
    assert config.data.seq_len == config.data.patches == 26 and config.objective.name == "classification"
    assert config.model.patches.mean == tuple(MEAN) and config.model.patches.std == tuple(STD)
    expected = NAMES if name == "named" else [f"LABEL_{number}" for number in range(7)]
    assert list(config.model.classes) == expected

    assert checkpoint_command("export", tmp_path / "run", back) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.shape == after[key].shape and torch.equal(tensor, after[key]), key
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, back)]
    for read in configs:
        del read["_name_or_path"]
    assert configs[0] == configs[1]
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hf_logits(theirs, pixels), hf_logits(back, pixels))


def test_a_png_gives_the_same_logits_through_both(tmp_path: Path) -> None:
    """Shards, stream and native model; file, image processor and their model. Sides that differ are squashed."""
    names = ["lynx", "heron", "tabby cat", "crane", "ox"]
    run, out, shard = tmp_path / "run", tmp_path / "own", tmp_path / "a.tar"
    CASES["five"] = OPTIONS | {"id2label": dict(enumerate(names))}
    folder = save_model("five", tmp_path / "hf")
    checkpoint_command("import", folder, run)
    (run / "huggingface.json").unlink()  # a model of our own
    assert checkpoint_command("export", run, out) == 0
    images = [picture(SIDE + 15 * row, SIDE * (1 + row), seed=row) for row in range(3)]
    samples = [{"__key__": f"{n}", "png": encoded(image), "txt": names[n]} for n, image in enumerate(images)]
    write_tar(shard, samples)

    trained = load_trained(run)
    dataset = ImageTextDataset(shard, as_tokenizer(names), progress=False)
    rows = to_torch(LabelStream(dataset, picture_form(trained.config), seq_len=26, shuffle=False).read(0, 3))
    objective = ClassificationObjective(ClassificationConfig())
    batch = objective.collate(rows)
    with torch.inference_mode():
        ours = trained.model.logits(objective.forward(trained.model, batch))

    processor = AutoImageProcessor.from_pretrained(out)
    files = [Image.fromarray(np.asarray(image)) for image in images]
    seen = processor(images=files, return_tensors="pt")["pixel_values"]
    assert ours.std() > 0.1  # else the next line would prove nothing
    torch.testing.assert_close(hf_logits(out, seen), ours, rtol=0, atol=1e-4)
    read: Any = AutoConfig.from_pretrained(out)
    assert read.id2label == dict(enumerate(names)) and read.label2id["tabby cat"] == 2


def test_a_block_that_differs_is_named(tmp_path: Path) -> None:
    theirs, run = save_model("named", tmp_path / "hf"), tmp_path / "run"
    checkpoint_command("import", theirs, run)
    tensors = load_file(theirs / "model.safetensors")
    tensors["vit.encoder.layer.1.layernorm_after.weight"] += 0.01
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="block 1 is the first whose output differs"):
        config = load_trained(run).config.model
        prove_outputs(theirs, config, run / "checkpoints" / "step-00000000", BRANDS["vit"], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 1}, "num_channels = 1 (allowed: 3)"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"image_size": [15, 18]}, "image_size = [15, 18]"),
        ({"qkv_bias": False}, "qkv_bias = False (allowed: True)"),
    ],
)
def test_config_features_we_lack_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    AutoConfig.for_model("vit", **{**OPTIONS, **change}).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        convert.look_at(tmp_path, BRANDS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tower_without_a_head_says_what_it_lacks(tmp_path: Path) -> None:
    folder = save_model("named", tmp_path / "hf")
    ViTModel(AutoConfig.for_model("vit", **CASES["named"]), add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"architectures = \['ViTModel'\] \(allowed: \['ViTForImageClassification'\]\)"
    ):
        checkpoint_command("import", folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pool": "mean", "vision": {"class_token": False}}, "model.pool = 'mean'"),
        ({"vision": {"grid": [3, 5]}}, "model.vision.grid = [3, 5]"),
        ({"vision": {"first_norm": True}}, "first_norm = True"),
    ],
)
def test_what_no_brand_expresses_says_why(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    theirs = save_model("named", tmp_path / "hf")
    native = ViTConfig.model_validate(convert.look_at(theirs, BRANDS).config).model_dump(mode="json")
    with pytest.raises(ValueError, match="no Hugging Face architecture expresses this model") as caught:
        choose_brand(BRANDS, {**native, **change, "vision": native["vision"] | change.get("vision", {})}, None)
    assert key in str(caught.value) and "\n" not in str(caught.value)

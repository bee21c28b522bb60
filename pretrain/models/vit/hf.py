"""Hugging Face key table and config of a vision transformer that classifies: `ViTForImageClassification`.

Names are those that transformers 5 writes, which are those of published files, and not of its modules.
"""

import torch

from checkpoints.hf import processor
from checkpoints.hf.brand import Brand, Config, ConfigRow, Mapped, OnlyHf, misfit
from checkpoints.hf.ops import Rename, Row, View
from checkpoints.hf.probe import Probe
from pretrain.models.decoder.hf import linear
from pretrain.models.decoder.hf_config import fixed
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.vlm.hf_probe import pack
from pretrain.models.vlm.hf_tower import TOWER_CONFIG, convolution


def add_two(shape: tuple[int, ...]) -> tuple[int, ...]:
    return 1, 1, shape[0]


ARCHITECTURE = "ViTForImageClassification"
LAYER = "vit.encoder.layer.{i}"
TENSORS: tuple[Row, ...] = (
    View("patch_embed.weight", "vit.embeddings.patch_embeddings.projection.weight", convolution),
    Rename("patch_embed.bias", "vit.embeddings.patch_embeddings.projection.bias"),
    View("class_embed.weight", "vit.embeddings.cls_token", add_two),
    View("pos_embed.weight", "vit.embeddings.position_embeddings", lambda shape: (1, *shape)),
    *linear("layers.{i}.attention_norm", f"{LAYER}.layernorm_before"),
    *linear("layers.{i}.attention.q", f"{LAYER}.attention.attention.query"),
    *linear("layers.{i}.attention.k", f"{LAYER}.attention.attention.key"),
    *linear("layers.{i}.attention.v", f"{LAYER}.attention.attention.value"),
    *linear("layers.{i}.attention.out", f"{LAYER}.attention.output.dense"),
    *linear("layers.{i}.mlp_norm", f"{LAYER}.layernorm_after"),
    *linear("layers.{i}.mlp.up", f"{LAYER}.intermediate.dense"),
    *linear("layers.{i}.mlp.down", f"{LAYER}.output.dense"),
    *linear("norm", "vit.layernorm"),
    *linear("head", "classifier"),
)

# Of the tower, as `[model.vision]` and the side of a patch say it.
TOWER: tuple[ConfigRow, ...] = (
    *TOWER_CONFIG,
    *fixed(class_token=True, first_norm=False, patch_bias=True, output_layer=-1),
    OnlyHf("qkv_bias", True),
)


def _tower_to_hf(native: Config) -> Config:
    patches = native["patches"]
    tower = native["vision"] | {"patch": patches["size"]}
    config: Config = {}
    for row in TOWER:
        config |= row.to_hf(tower)
    images = {"image_mean": list(patches["mean"]), "image_std": list(patches["std"])}
    return {**config, processor.KEY: {processor.IMAGES: images, "side": config["image_size"]}}


def _tower_to_native(hf: Config) -> Config:
    tower: Config = {}
    for row in TOWER:
        tower |= row.to_native(hf)
    mean, std = processor.mean_and_std(hf)
    return {"patches": {"size": tower.pop("patch"), "mean": mean, "std": std}, "vision": tower}


def _classes_to_hf(native: Config) -> Config:
    names = list(native["classes"])
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _classes_to_native(hf: Config) -> Config:
    names = {int(number): name for number, name in hf["id2label"].items()}
    if sorted(names) != list(range(len(names))):
        raise misfit("id2label", sorted(names), [f"0 to {len(names) - 1}"])
    return {"classes": [names[number] for number in range(len(names))]}


def _with_head(hf: Config) -> Config:
    """A bare tower (`ViTModel`) has no classes to tell."""
    if hf.get("architectures") not in (None, [ARCHITECTURE]):
        raise misfit("architectures", hf["architectures"], [[ARCHITECTURE]])
    return {}


def probe(native: Config) -> Probe:
    """Two random pictures."""
    generator, patches = torch.Generator().manual_seed(0), native["patches"]
    side = native["vision"]["grid"][0] * patches["size"]
    pixels = torch.randint(256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    cut = [pack(picture[None], patches["size"], True)[0] for picture in pixels]
    mean, std = (torch.tensor(patches[key])[:, None, None] for key in ("mean", "std"))
    ours = {name: torch.cat([getattr(picture, theirs) for picture in cut]) for name, theirs in INPUTS.items()}
    mask = AttentionMask(causal=False)
    return Probe(None, {**ours, "mask": mask}, {"pixel_values": (pixels / 255 - mean) / std})


INPUTS = {"x": "patches", "grid": "grid"}  # of our model, and where a row of pictures has them

VIT = Brand(
    "vit",
    ARCHITECTURE,
    TENSORS,
    (
        *fixed(family="vit", pool="class"),
        Mapped(
            ("vision", "patches"),
            (*(key for row in TOWER for key in row.hf), processor.KEY),
            _tower_to_hf,
            _tower_to_native,
        ),
        Mapped((), ("architectures",), lambda native: {}, _with_head),
        Mapped(("classes",), ("id2label", "label2id"), _classes_to_hf, _classes_to_native),
    ),
    carried=(
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "encoder_stride",
        "pooler_act",
        "pooler_output_size",
    ),
    prefix="vit.",
    probe=probe,
    patches=lambda native: native["vision"]["grid"][0] ** 2 + 1,
    objective={"name": "classification"},
)

BRANDS: dict[str, Brand] = {VIT.model_type: VIT}

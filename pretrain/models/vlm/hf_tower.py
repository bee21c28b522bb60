"""Hugging Face's vision towers: key tables and config rows of CLIP's and SigLIP's.

A tower's native config is `[model.vision]` without `output_layer`, which is the whole model's to say, and with `patch`,
the side of a patch in pixels.
"""

from checkpoints.hf.brand import Brand, Choice, Config, ConfigRow, Mapped, OnlyHf, misfit
from checkpoints.hf.ops import Rename, Row, View
from pretrain.models.decoder.hf import linear
from pretrain.models.decoder.hf_config import fixed, same

ACTIVATIONS = (
    ("quick_gelu", "quick_gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu"), ("silu", "silu"),
    ("relu", "relu"), ("gelu_tanh", "gelu_new"), ("silu", "swish"),
)  # fmt: skip
ACTIVATION = Choice("activation", "hidden_act", ACTIVATIONS)


def convolution(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, 3 * p * p] as the weight of a convolution, [H, 3, p, p]."""
    side = round((shape[1] / 3) ** 0.5)
    return shape[0], 3, side, side


def drop_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1]


# CLIP has a class token and a first norm, SigLIP a bias of patches; all else has the same names.
TOWER_TENSORS: tuple[Row, ...] = (
    View("patch_embed.weight", "embeddings.patch_embedding.weight", convolution),
    Rename("patch_embed.bias", "embeddings.patch_embedding.bias"),
    View("class_embed.weight", "embeddings.class_embedding", drop_last),
    Rename("pos_embed.weight", "embeddings.position_embedding.weight"),
    *linear("first_norm", "pre_layrnorm"),
    *linear("layers.{i}.attention_norm", "encoder.layers.{i}.layer_norm1"),
    *linear("layers.{i}.attention.q", "encoder.layers.{i}.self_attn.q_proj"),
    *linear("layers.{i}.attention.k", "encoder.layers.{i}.self_attn.k_proj"),
    *linear("layers.{i}.attention.v", "encoder.layers.{i}.self_attn.v_proj"),
    *linear("layers.{i}.attention.out", "encoder.layers.{i}.self_attn.out_proj"),
    *linear("layers.{i}.mlp_norm", "encoder.layers.{i}.layer_norm2"),
    *linear("layers.{i}.mlp.up", "encoder.layers.{i}.mlp.fc1"),
    *linear("layers.{i}.mlp.down", "encoder.layers.{i}.mlp.fc2"),
    *linear("norm", "post_layernorm"),
)


def _grid_to_hf(native: Config) -> Config:
    rows, columns = native["grid"]
    if rows != columns:
        raise misfit("model.vision.grid", native["grid"], [[rows, rows], [columns, columns]])
    return {"image_size": rows * native["patch"], "patch_size": native["patch"]}


def _grid_to_native(hf: Config) -> Config:
    """Pixels past the last whole patch are no part of what the tower sees (SigLIP: 384 pixels, patches of 14)."""
    for key in ("image_size", "patch_size"):
        if not isinstance(hf[key], int):
            raise misfit(key, hf[key], ["one number"])
    side = hf["image_size"] // hf["patch_size"]
    return {"grid": [side, side], "patch": hf["patch_size"]}


TOWER_CONFIG: tuple[ConfigRow, ...] = (
    *same(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        ffn="intermediate_size",
        norm_eps="layer_norm_eps",
    ),
    ACTIVATION,
    *fixed(norm="layer", bias=True, positions="learned", final_norm=True),
    Mapped(("grid", "patch"), ("image_size", "patch_size"), _grid_to_hf, _grid_to_native),
    OnlyHf("num_channels", 3),
)
CLIP_TOWER = Brand(
    "clip_vision_model",
    "CLIPVisionModel",
    TOWER_TENSORS,
    (*TOWER_CONFIG, *fixed(class_token=True, first_norm=True, patch_bias=False)),
    carried=("projection_dim", "initializer_range", "initializer_factor"),
)
# The head that pools patches has no part in a language model's sight: it is not imported, and not asked for.
SIGLIP_TOWER = Brand(
    "siglip_vision_model",
    "SiglipVisionModel",
    TOWER_TENSORS,
    (
        *TOWER_CONFIG,
        *fixed(class_token=False, first_norm=False, patch_bias=True),
        Mapped((), ("vision_use_head",), lambda native: {"vision_use_head": False}, lambda hf: {}),
    ),
)
TOWERS: dict[str, Brand] = {brand.model_type: brand for brand in (CLIP_TOWER, SIGLIP_TOWER)}

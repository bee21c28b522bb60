"""Hugging Face key tables and configs of dual encoders: CLIP and SigLIP, as transformers 5 writes them."""

import math

import torch

from checkpoints.hf import processor
from checkpoints.hf.brand import Brand, Choice, Config, ConfigRow, Mapped, OnlyHf, OnlyNative, Same, misfit
from checkpoints.hf.inner import inner_to_hf, inner_to_native
from checkpoints.hf.ops import Concat, Rename, Row, View, under
from checkpoints.hf.probe import Probe
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.hf import linear
from pretrain.models.decoder.hf_config import DENSE, FULL_LAYERS, HEADS, PLAIN, fixed, norms, same
from pretrain.models.vlm.hf_probe import pack
from pretrain.models.vlm.hf_tower import ACTIVATIONS, CLIP_TOWER, SIGLIP_TOWER, TOWER_TENSORS
from pretrain.models.vlm.model import Pictures

TEXT_KEYS = tuple(name for name in DecoderConfig.model_fields if name != "family")
BLOCKS = tuple(row for row in TOWER_TENSORS if row.native[0].startswith("layers."))  # texts' have the same names
TOWERS: tuple[Row, ...] = (
    Rename("embed.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("pos_embed.weight", "text_model.embeddings.position_embedding.weight"),
    *under(BLOCKS, hf="text_model."),
    *linear("norm", "text_model.final_layer_norm"),
    *under(TOWER_TENSORS, native="vision.", hf="vision_model."),
)
CLIP_TENSORS: tuple[Row, ...] = (
    *TOWERS,
    Rename("image_head.weight", "visual_projection.weight"),
    Rename("text_head.weight", "text_projection.weight"),
    View("log_scale.weight", "logit_scale", lambda shape: ()),
)
QKV = tuple(f"pool.{name}" for name in "qkv")
SIGLIP_TENSORS: tuple[Row, ...] = (
    *TOWERS,
    View("pool.probe_embed.weight", "vision_model.head.probe", lambda shape: (1, *shape)),
    Concat(tuple(f"{name}.weight" for name in QKV), "vision_model.head.attention.in_proj_weight"),
    Concat(tuple(f"{name}.bias" for name in QKV), "vision_model.head.attention.in_proj_bias"),
    *linear("pool.out", "vision_model.head.attention.out_proj"),
    *linear("pool.norm", "vision_model.head.layernorm"),
    *linear("pool.mlp.up", "vision_model.head.mlp.fc1"),
    *linear("pool.mlp.down", "vision_model.head.mlp.fc2"),
    *linear("text_head", "text_model.head"),
    Rename("log_scale.weight", "logit_scale"),
    Rename("offset.weight", "logit_bias"),
)
POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


# --- the tower of texts ---


def _heads_to_hf(native: Config) -> Config:
    heads, head_dim = native["heads"], native["head_dim"]
    if native["mla"] is not None:
        raise misfit("model.mla", "set", [None])
    if native["kv_heads"] not in (0, heads):
        raise misfit("model.kv_heads", native["kv_heads"], [0, heads])
    if head_dim and head_dim * heads != native["hidden"]:
        raise misfit("model.head_dim", head_dim, [0, native["hidden"] / heads])
    return {"num_attention_heads": heads}


def text_brand(model_type: str, *rows: ConfigRow) -> Brand:
    """The config of a tower of texts; native: what a decoder has."""
    config: tuple[ConfigRow, ...] = (
        *same(hidden="hidden_size", layers="num_hidden_layers", ffn="intermediate_size", norm_eps="layer_norm_eps"),
        *same(vocab_size="vocab_size", max_seq_len="max_position_embeddings"),
        Choice("activation", "hidden_act", ACTIVATIONS),
        Mapped(
            HEADS,
            ("num_attention_heads",),
            _heads_to_hf,
            lambda hf: {"heads": hf["num_attention_heads"], "kv_heads": 0, "head_dim": 0, "mla": None},
        ),
        *fixed(gated=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
        Mapped(("rope", "rope_local", "rotary_fraction"), (), lambda native: {}, lambda hf: {}),  # unused
        Mapped(("tied",), (), lambda native: {}, lambda hf: {"tied": False}),  # unused: there is no head
        *norms("layer"),
        DENSE,
        FULL_LAYERS,
        *PLAIN,
        *rows,
    )
    return Brand(model_type, "", (), config, carried=("initializer_factor", "projection_dim"))


CLIP_TEXT = text_brand("clip_text_model", Same("init_std", "initializer_range"))
SIGLIP_TEXT = text_brand(
    "siglip_text_model",
    Mapped(("init_std",), (), lambda native: {}, lambda hf: {}),
    Same("features", "projection_size"),
)
POOLED_SIGLIP_TOWER = Brand(
    SIGLIP_TOWER.model_type,
    SIGLIP_TOWER.architecture,
    SIGLIP_TOWER.tensors,
    (*(row for row in SIGLIP_TOWER.config if "vision_use_head" not in row.hf), OnlyHf("vision_use_head", True)),
)


# --- both together ---


def text_row(brand: Brand, *more: str) -> ConfigRow:
    """The whole's `text_config`. more: what this brand says there of the whole."""
    keys = (*TEXT_KEYS, *more)
    brands = {brand.model_type: brand}
    return Mapped(
        keys,
        ("text_config",),
        lambda native: {"text_config": inner_to_hf(brands, {key: native[key] for key in keys})},
        lambda hf: inner_to_native(brands, hf, "text_config"),
    )


def vision_row(brand: Brand) -> ConfigRow:
    """The whole's `vision_config`, and the processor that makes its pictures, which are squares."""
    brands = {brand.model_type: brand}

    def write(native: Config) -> Config:
        patches = native["patches"]
        tower = native["vision"] | {"patch": patches["size"]}
        OnlyNative("output_layer", -1).to_hf(tower)
        vision = inner_to_hf(brands, {key: v for key, v in tower.items() if key != "output_layer"})
        images = {"image_mean": list(patches["mean"]), "image_std": list(patches["std"])}
        return {"vision_config": vision, processor.KEY: {processor.IMAGES: images, "side": vision["image_size"]}}

    def read(hf: Config) -> Config:
        vision = inner_to_native(brands, hf, "vision_config")
        mean, std = processor.mean_and_std(hf)
        return {
            "patches": {"size": vision.pop("patch"), "mean": mean, "std": std},
            "vision": {**vision, "output_layer": -1},
        }

    return Mapped(("vision", "patches"), ("vision_config", processor.KEY), write, read)


def _needs_bias(native: Config) -> Config:
    if native["logit_bias"] is None:
        raise misfit("model.logit_bias", None, ["a number"])
    return {}


def limit(value: float) -> ConfigRow:
    """Of training alone: a limit of the factor that is learned."""
    return Mapped(("max_logit_scale",), (), lambda native: {}, lambda hf: {"max_logit_scale": value})


def places(native: Config) -> int:
    """Image patches of one picture, its class token's place included."""
    rows, columns = native["vision"]["grid"]
    return int(rows * columns + native["vision"]["class_token"])


def probe(native: Config) -> Probe:
    """Two random pictures and two random texts of different lengths, the first token of the vocabulary after them."""
    generator, patches = torch.Generator().manual_seed(0), native["patches"]
    side = native["vision"]["grid"][0] * patches["size"]
    pixels = torch.randint(256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    cut = [pack(picture[None], patches["size"], native["vision"]["class_token"])[0] for picture in pixels]
    rows = [torch.cat([getattr(picture, name) for picture in cut]) for name in ("patches", "images", "grid")]
    length = min(16, native["max_seq_len"])
    lengths = torch.tensor([length, length // 2 + 1])
    tokens = torch.randint(native["vocab_size"], (2, length), generator=generator)
    tokens[torch.arange(length) >= lengths[:, None]] = 0
    mean, std = (torch.tensor(patches[key])[:, None, None] for key in ("mean", "std"))
    seen = {"pixel_values": (pixels / 255 - mean) / std}
    return Probe(tokens, {"pictures": Pictures.packed(*rows), "lengths": lengths}, seen)


CLIP = Brand(
    "clip",
    "CLIPModel",
    CLIP_TENSORS,
    (
        *fixed(family="dual", image_pool="class", text_pool="end", image_head=True, text_bias=False, logit_bias=None),
        text_row(CLIP_TEXT),
        vision_row(CLIP_TOWER),
        Same("features", "projection_dim"),
        Mapped(
            ("logit_scale",),
            ("logit_scale_init_value",),
            # as it was written, 2.6592, and not what rounding makes of it
            lambda native: {"logit_scale_init_value": round(math.log(native["logit_scale"]), 12)},
            lambda hf: {"logit_scale": math.exp(hf["logit_scale_init_value"])},
        ),
        limit(100.0),
    ),
    carried=("initializer_factor",),
    ignored=POSITION_IDS,
    prefix="",
    probe=probe,
    patches=places,
    pairs=True,
    looks_for_end=True,
    objective={"name": "contrastive", "loss": "softmax"},
    inner={
        "text_config": {"clip_text_model": CLIP_TEXT},
        "vision_config": {"clip_vision_model": CLIP_TOWER},
    },
)
SIGLIP = Brand(
    "siglip",
    "SiglipModel",
    SIGLIP_TENSORS,
    (
        *fixed(family="dual", image_pool="map", text_pool="last", image_head=False, text_bias=True),
        text_row(SIGLIP_TEXT, "features"),
        vision_row(POOLED_SIGLIP_TOWER),
        # Of the start of training, which transformers does not keep.
        Mapped(("logit_scale",), (), lambda native: {}, lambda hf: {"logit_scale": 10.0}),
        Mapped(("logit_bias",), (), _needs_bias, lambda hf: {"logit_bias": -10.0}),
        limit(0.0),
    ),
    carried=("initializer_factor",),
    ignored=POSITION_IDS,
    prefix="",
    probe=probe,
    patches=places,
    pairs=True,
    objective={"name": "contrastive", "loss": "sigmoid"},
    inner={
        "text_config": {"siglip_text_model": SIGLIP_TEXT},
        "vision_config": {"siglip_vision_model": POOLED_SIGLIP_TOWER},
    },
)

BRANDS: dict[str, Brand] = {brand.model_type: brand for brand in (CLIP, SIGLIP)}

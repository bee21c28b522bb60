"""Fuyu: no tower, patches go through one matrix into Persimmon, a decoder of layer norms and squared ReLU."""

import torch
from torch import Tensor

from checkpoints.hf.brand import Brand, Choice, Config, Mapped, OnlyHf, OnlyNative, misfit
from checkpoints.hf.ops import ChannelsLast, PerHead, Rename, Row, under
from checkpoints.hf.probe import Probe
from checkpoints.hf.processor import mean_and_std
from checkpoints.hf.rope import rope_to_hf, rope_to_native
from pretrain.models.decoder.hf import linear
from pretrain.models.decoder.hf_config import DENSE, FULL_LAYERS, HEADS, PLAIN, fixed, norms, same
from pretrain.models.vlm.hf_probe import as_patches, picture_probe
from pretrain.models.vlm.hf_text import text_row
from pretrain.models.vlm.hf_tower import ACTIVATIONS

LAYER, ATTENTION = "model.layers.{i}", "layers.{i}.attention"


def fused(kind: str) -> Row:
    """Weights or biases of queries, keys and values, and of the queries' norm."""
    native = tuple(f"{ATTENTION}.{name}.{kind}" for name in ("q", "k", "v", "q_norm"))
    return PerHead(native, (f"{LAYER}.self_attn.query_key_value.{kind}", f"{LAYER}.self_attn.q_layernorm.{kind}"))


PERSIMMON_TENSORS: tuple[Row, ...] = (
    Rename("embed.weight", "model.embed_tokens.weight"),
    fused("weight"),
    fused("bias"),
    *linear(f"{ATTENTION}.k_norm", f"{LAYER}.self_attn.k_layernorm"),
    *linear(f"{ATTENTION}.out", f"{LAYER}.self_attn.dense"),
    *linear("layers.{i}.mlp.up", f"{LAYER}.mlp.dense_h_to_4h"),
    *linear("layers.{i}.mlp.down", f"{LAYER}.mlp.dense_4h_to_h"),
    *linear("layers.{i}.attention_norm", f"{LAYER}.input_layernorm"),
    *linear("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *linear("norm", "model.final_layernorm"),
    Rename("head.weight", "lm_head.weight"),
)


def _heads_to_hf(native: Config) -> Config:
    heads = native["heads"]
    if native["mla"] is not None:
        raise misfit("model.mla", "set", [None])
    if native["kv_heads"] not in (0, heads):
        raise misfit("model.kv_heads", native["kv_heads"], [0, heads])
    if native["head_dim"] and native["head_dim"] * heads != native["hidden"]:
        raise misfit("model.head_dim", native["head_dim"], [0, native["hidden"] / heads])
    return {"num_attention_heads": heads}


def _heads_to_native(hf: Config) -> Config:
    heads = hf["num_attention_heads"]
    return {"heads": heads, "kv_heads": heads, "head_dim": 0, "mla": None}


def _rope_to_hf(native: Config) -> Config:
    return {"rope_parameters": rope_to_hf(native["rope"]) | {"partial_rotary_factor": native["rotary_fraction"]}}


def _rope_to_native(hf: Config) -> Config:
    parameters = dict(hf["rope_parameters"])
    fraction = parameters.pop("partial_rotary_factor", 1.0)
    rope = rope_to_native(parameters, "rope_parameters", hf["max_position_embeddings"])
    return {"rope": rope, "rotary_fraction": fraction}


PERSIMMON = Brand(
    "persimmon",
    "PersimmonForCausalLM",
    PERSIMMON_TENSORS,
    (
        *fixed(family="decoder", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, positions="rope"),
        *same(
            vocab_size="vocab_size",
            hidden="hidden_size",
            layers="num_hidden_layers",
            ffn="intermediate_size",
            max_seq_len="max_position_embeddings",
            norm_eps="layer_norm_eps",
            init_std="initializer_range",
            tied="tie_word_embeddings",
        ),
        Mapped(HEADS, ("num_attention_heads",), _heads_to_hf, _heads_to_native),
        Mapped(("rope", "rotary_fraction"), ("rope_parameters",), _rope_to_hf, _rope_to_native),
        OnlyNative("rope_local", None),
        Choice("activation", "hidden_act", (("relu2", "relu2"), *ACTIVATIONS)),
        OnlyHf("qk_layernorm", True),
        *norms("layer", qk="head"),
        DENSE,
        FULL_LAYERS,
        *PLAIN,
    ),
    carried=("hidden_dropout",),
)
PERSIMMONS = {"persimmon": PERSIMMON}


def _pictures_to_hf(native: Config) -> Config:
    connector, patches = native["connector"], native["patches"]
    if native["vision"] is not None:
        raise misfit("model.vision", "set", [None])
    for key, value in (("kind", "linear"), ("merge", 1), ("bias", True)):
        if connector[key] != value:
            raise misfit(f"model.connector.{key}", connector[key], [value])
    images = {
        "image_processor_type": "FuyuImageProcessor",
        "image_mean": list(patches["mean"]),
        "image_std": list(patches["std"]),
        "patch_size": {"height": patches["size"], "width": patches["size"]},
    }
    token = {"image_token_id": native["image_token"], "fixed_image_token": "|SPEAKER|"}
    return {
        "patch_size": patches["size"],
        "image_token_id": native["image_token"],
        "processor": {"processor_class": "FuyuProcessor", "image_processor": images, **token},
    }


def _pictures_to_native(hf: Config) -> Config:
    mean, std = ([value] * 3 if isinstance(value, float) else value for value in mean_and_std(hf))  # one for all
    return {
        "vision": None,
        "connector": {"kind": "linear", "bias": True},
        "patches": {"size": hf["patch_size"], "mean": mean, "std": std},
        "image_token": hf["image_token_id"],
    }


PICTURES = Mapped(
    ("vision", "connector", "patches", "image_token"),
    ("patch_size", "processor", "image_token_id"),
    _pictures_to_hf,
    _pictures_to_native,
)
SIDE = 3  # patches of the proof's pictures, which may be of any size


def _seen(native: Config, pictures: Tensor) -> dict[str, Tensor]:
    """All pictures of a row as one sequence of patches, each as (y, x, channel)."""
    patches = as_patches(pictures, native["patches"]["size"])
    rows = patches.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)
    return {"pixel_values": torch.cat(list(rows))[None]}


def _probe(native: Config) -> Probe:
    return picture_probe(native, SIDE, lambda pictures: _seen(native, pictures))


FUYU = Brand(
    "fuyu",
    "FuyuForCausalLM",
    (
        *under(PERSIMMON_TENSORS, hf="language_model."),
        ChannelsLast("connector.project.weight", "vision_embed_tokens.weight"),
        Rename("connector.project.bias", "vision_embed_tokens.bias"),
    ),
    (
        text_row(PERSIMMONS),
        PICTURES,
        OnlyHf("num_channels", 3),
    ),
    carried=("processor", "image_size", "initializer_range"),
    ignored=("language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq",),
    prefix="",
    inner={"text_config": PERSIMMONS},
    probe=_probe,
    patches=lambda native: 1024,
)

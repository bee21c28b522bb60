"""Hugging Face key tables of the vision-language brands: a decoder's and a tower's, each under its prefix."""

from checkpoints.hf.brand import Brand, Choice, Config, Mapped, Same, misfit
from checkpoints.hf.inner import inner_to_hf, inner_to_native
from checkpoints.hf.ops import Row, under
from checkpoints.hf.probe import Probe
from checkpoints.hf.processor import mean_and_std
from pretrain.models.decoder.hf import BRANDS as DECODERS
from pretrain.models.decoder.hf import linear
from pretrain.models.vlm.hf_fuyu import FUYU
from pretrain.models.vlm.hf_probe import picture_probe
from pretrain.models.vlm.hf_text import text_row
from pretrain.models.vlm.hf_tower import ACTIVATIONS, TOWER_TENSORS, TOWERS

# Language models whose tensors have the same names, or none.
LANGUAGE = {name: DECODERS[name] for name in ("llama", "qwen2", "qwen3", "mistral")}
LANGUAGE_TENSORS: tuple[Row, ...] = tuple(dict.fromkeys(row for brand in LANGUAGE.values() for row in brand.tensors))


def _tower_to_hf(native: Config) -> Config:
    vision = native["vision"]
    if vision is None:
        raise misfit("model.vision", None, ["a table"])
    tower = {key: value for key, value in vision.items() if key != "output_layer"}
    inner = inner_to_hf(TOWERS, tower | {"patch": native["patches"]["size"], "final_norm": True})
    if vision["output_layer"] == -1 and vision["final_norm"]:
        if vision["class_token"]:
            raise misfit("model.vision.final_norm", True, ["False: CLIP norms its class token alone"])
        inner["tie_last_hidden_states"] = True  # transformers' word for the last block's output after the final norm
    side = vision["grid"][0]
    return {
        "vision_config": inner,
        "vision_feature_layer": vision["output_layer"],
        "vision_feature_select_strategy": "default" if vision["class_token"] else "full",
        "image_seq_length": side * side,
        "processor": _processor(native, side),
    }


def _processor(native: Config, side: int) -> Config:
    class_token, patches = native["vision"]["class_token"], native["patches"]
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patches["size"],
        "num_additional_image_tokens": int(class_token),
        "vision_feature_select_strategy": "default" if class_token else "full",
        "image_token_id": native["image_token"],
        "side": side * patches["size"],
        "image_processor": {"image_mean": list(patches["mean"]), "image_std": list(patches["std"])},
    }


def _tower_to_native(hf: Config) -> Config:
    tower = inner_to_native(TOWERS, hf, "vision_config")
    layer, strategy = hf["vision_feature_layer"], hf["vision_feature_select_strategy"]
    if not isinstance(layer, int):
        raise misfit("vision_feature_layer", layer, ["one number"])
    layer = layer if layer < 0 else layer - tower["layers"] - 1
    if not -tower["layers"] <= layer < 0:
        raise misfit("vision_feature_layer", hf["vision_feature_layer"], [f"{-tower['layers']} to -1"])
    tied = not tower["class_token"] and hf["vision_config"].get("tie_last_hidden_states", False)
    tower["final_norm"] = layer < -1 or tied
    expected = "default" if tower["class_token"] else "full"
    if strategy != expected:
        raise misfit("vision_feature_select_strategy", strategy, [expected])
    mean, std = mean_and_std(hf)
    patch = tower.pop("patch")
    return {"vision": tower | {"output_layer": layer}, "patches": {"size": patch, "mean": mean, "std": std}}


TOWER_KEYS = ("vision_config", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length")
TOWER = Mapped(("vision", "patches"), (*TOWER_KEYS, "processor"), _tower_to_hf, _tower_to_native)
PROJECTOR_ACTIVATION = Choice("activation", "projector_hidden_act", ACTIVATIONS)


def _connector_to_hf(native: Config) -> Config:
    connector = native["connector"]
    for key, allowed in (("kind", ["mlp"]), ("merge", [1]), ("ffn", [0, native["hidden"]])):
        if connector[key] not in allowed:
            raise misfit(f"model.connector.{key}", connector[key], allowed)
    return {**PROJECTOR_ACTIVATION.to_hf(connector), "multimodal_projector_bias": connector["bias"]}


def _connector_to_native(hf: Config) -> Config:
    given = {**PROJECTOR_ACTIVATION.to_native(hf), "kind": "mlp", "bias": hf["multimodal_projector_bias"]}
    return {"connector": given}


CONNECTOR = Mapped(
    ("connector",), ("projector_hidden_act", "multimodal_projector_bias"), _connector_to_hf, _connector_to_native
)
OLD_TOWER = "vision_tower.vision_model."  # what published files call it


def _llava_probe(native: Config) -> Probe:
    return picture_probe(native, native["vision"]["grid"][0], lambda pictures: {"pixel_values": pictures})


def _llava_patches(native: Config) -> int:
    rows, columns = native["vision"]["grid"]
    return rows * columns + native["vision"]["class_token"]


LLAVA = Brand(
    "llava",
    "LlavaForConditionalGeneration",
    (
        *under(LANGUAGE_TENSORS, hf="language_model."),
        *under(TOWER_TENSORS, native="vision.", hf="vision_tower."),
        *linear("connector.up", "multi_modal_projector.linear_1"),
        *linear("connector.down", "multi_modal_projector.linear_2"),
    ),
    (text_row(LANGUAGE), TOWER, CONNECTOR, Same("image_token", "image_token_index")),
    carried=("processor",),
    ignored=(
        "language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq",
        "vision_tower.*embeddings.position_ids",
        "vision_tower.head.*",
        f"{OLD_TOWER}head.*",
    ),
    prefix="",
    also=under(TOWER_TENSORS, native="vision.", hf=OLD_TOWER),
    inner={"text_config": LANGUAGE, "vision_config": TOWERS},
    probe=_llava_probe,
    patches=_llava_patches,
)

BRANDS: dict[str, Brand] = {brand.model_type: brand for brand in (LLAVA, FUYU)}

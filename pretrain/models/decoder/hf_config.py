"""Config rows of the decoder brands: which key of config.json says what a field of `DecoderConfig` says."""

import math
from collections.abc import Callable

from checkpoints.hf.brand import Choice, Config, ConfigRow, Mapped, OnlyHf, OnlyNative, Same, misfit
from checkpoints.hf.layers import HF_KINDS, Kinds, kinds_to_hf, kinds_to_native, layer_kinds, shortest_pattern
from checkpoints.hf.rope import rope_to_hf, rope_to_native


def same(**names: str) -> tuple[ConfigRow, ...]:
    """Our key = theirs, with the same value."""
    return tuple(Same(ours, theirs) for ours, theirs in names.items())


def fixed(**values: object) -> tuple[ConfigRow, ...]:
    """Our keys that this brand knows with one value alone."""
    return tuple(OnlyNative(key, value) for key, value in values.items())


def one_rope() -> tuple[ConfigRow, ...]:
    """All layers rotate alike."""
    row = Mapped(("rope",), ("rope_parameters",), _one_rope_to_hf, _one_rope_to_native)
    return row, *fixed(rope_local=None, rotary_fraction=1.0, positions="rope")


def _one_rope_to_hf(native: Config) -> Config:
    return {"rope_parameters": rope_to_hf(native["rope"])}


def _one_rope_to_native(hf: Config) -> Config:
    return {"rope": rope_to_native(hf["rope_parameters"], "rope_parameters", hf["max_position_embeddings"])}


def rope_by_layer() -> tuple[ConfigRow, ...]:
    """Full and sliding layers rotate each in their way."""
    row = Mapped(("rope", "rope_local"), ("rope_parameters",), _two_ropes_to_hf, _two_ropes_to_native)
    return row, *fixed(rotary_fraction=1.0, positions="rope")


def _two_ropes_to_hf(native: Config) -> Config:
    ropes = {"full_attention": native["rope"], "sliding_attention": native["rope_local"] or native["rope"]}
    return {"rope_parameters": {kind: rope_to_hf(rope) for kind, rope in ropes.items()}}


def _two_ropes_to_native(hf: Config) -> Config:
    full, local = (
        rope_to_native(hf["rope_parameters"][kind], f"rope_parameters.{kind}", hf["max_position_embeddings"])
        for kind in ("full_attention", "sliding_attention")
    )
    return {"rope": full, "rope_local": local}


# --- which layers see what ---


def _full_to_hf(native: Config) -> Config:
    layer_kinds(native, "full")
    return {}


def _mistral_to_hf(native: Config) -> Config:
    kinds = layer_kinds(native, "full", "sliding")
    if len(set(kinds)) > 1:
        raise misfit("model.pattern", native["pattern"], [["full"], ["sliding"]])
    return {"sliding_window": native["window"] if kinds[0] == "sliding" else None}


def _mistral_to_native(hf: Config) -> Config:
    window = hf["sliding_window"]
    return {"pattern": ["sliding"], "window": window} if window else {"pattern": ["full"], "window": 0}


def _qwen_moe_to_hf(native: Config) -> Config:
    config = _mistral_to_hf(native)
    return config | {"use_sliding_window": config["sliding_window"] is not None}


def _qwen_to_hf(native: Config) -> Config:
    kinds = layer_kinds(native, "full", "sliding")
    config = _layer_types_to_hf(kinds, native)
    if config["use_sliding_window"]:  # the layers from here on may slide; `layer_types` says which do
        config["max_window_layers"] = kinds.index("sliding")
    return config


def _layer_types_to_hf(kinds: Kinds, native: Config) -> Config:
    sliding = "sliding" in kinds
    return {
        "layer_types": kinds_to_hf(kinds),
        "use_sliding_window": sliding,
        "sliding_window": native["window"] if sliding else None,
    }


def _qwen_to_native(hf: Config) -> Config:
    kinds = kinds_to_native(hf["layer_types"])
    if "sliding" in kinds and not hf["sliding_window"]:
        raise misfit("sliding_window", hf["sliding_window"], ["a number of tokens, as layer_types has sliding layers"])
    return {"pattern": shortest_pattern(kinds), "window": hf["sliding_window"] if "sliding" in kinds else 0}


def _smollm3_to_hf(native: Config) -> Config:
    kinds = layer_kinds(native, "full", "sliding", "nope")
    seen = ["full" if kind == "nope" else kind for kind in kinds]
    return {"no_rope_layers": [int(kind != "nope") for kind in kinds], **_layer_types_to_hf(seen, native)}


def _smollm3_to_native(hf: Config) -> Config:
    config = _qwen_to_native(hf)
    kinds = kinds_to_native(hf["layer_types"])
    if "sliding" in kinds and not hf["use_sliding_window"]:
        raise misfit("use_sliding_window", False, ["True, as layer_types has sliding layers"])
    for index, (kind, has_rope) in enumerate(zip(kinds, hf["no_rope_layers"], strict=False)):
        if not has_rope:
            if kind == "sliding":
                raise misfit(f"layer_types[{index}]", HF_KINDS[kind], ["full_attention, as the layer has no RoPE"])
            kinds[index] = "nope"
    return config | {"pattern": shortest_pattern(kinds)}


def _gemma_to_hf(native: Config) -> Config:
    kinds = layer_kinds(native, "full", "sliding")
    window = native["window"] or native["max_seq_len"]  # asked for even where no layer slides
    return {"layer_types": kinds_to_hf(kinds), "sliding_window": window}


def _gemma_to_native(hf: Config) -> Config:
    return {"pattern": shortest_pattern(kinds_to_native(hf["layer_types"])), "window": hf["sliding_window"] or 0}


# --- the rest ---


def _attention_bias_to_hf(native: Config) -> Config:
    if native["qkv_bias"] != native["out_bias"]:
        raise misfit("model.out_bias", native["out_bias"], [f"{native['qkv_bias']}, as model.qkv_bias"])
    return {"attention_bias": native["qkv_bias"]}


def _heads_to_hf(even: bool, own_head_dim: bool) -> Callable[[Config], Config]:
    """even: transformers asks that heads divide the width, even where head_dim is set. own_head_dim: its default is
    not the width over the heads, but a number of the brand's.
    """

    def write(native: Config) -> Config:
        _no_latent_attention(native)
        heads = native["heads"]
        if even and native["hidden"] % heads:
            raise misfit("model.hidden", native["hidden"], [f"multiples of model.heads = {heads}"])
        config = {"num_attention_heads": heads, "num_key_value_heads": native["kv_heads"] or heads}
        return config | ({"head_dim": _head_dim(native)} if native["head_dim"] or own_head_dim else {})

    return write


def _heads_to_native(hf: Config) -> Config:
    heads = hf["num_attention_heads"]
    kv_heads, head_dim = hf["num_key_value_heads"] or heads, hf.get("head_dim") or 0
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "mla": None}


def _no_latent_attention(native: Config) -> None:
    if native["mla"] is not None:
        raise misfit("model.mla", "set", [None])


def _head_dim(native: Config) -> int:
    return native["head_dim"] or native["hidden"] // native["heads"]


def _dense_to_hf(native: Config) -> Config:
    if native["moe"] is not None:
        raise misfit("model.moe", "set", [None])
    return {}


HEADS = ("heads", "kv_heads", "head_dim", "mla")


def heads(even: bool = False, own_head_dim: bool = False) -> ConfigRow:
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return Mapped(HEADS, keys, _heads_to_hf(even, own_head_dim), _heads_to_native)


def activation(hf_key: str, tanh_word: str = "gelu_pytorch_tanh") -> ConfigRow:
    """`gelu_new` and `gelu_pytorch_tanh` are one function."""
    words = ("silu", "silu"), ("gelu_tanh", tanh_word), ("gelu", "gelu"), ("relu", "relu")
    aliases = ("silu", "swish"), ("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_pytorch_tanh")
    return Choice("activation", hf_key, (*words, *aliases))


def layer_rows(write: Callable[[Config], Config], read: Callable[[Config], Config], *hf: str) -> ConfigRow:
    return Mapped(("pattern", "window"), hf, write, read)


SIZES_BUT_FFN: tuple[ConfigRow, ...] = (
    *fixed(family="decoder", gated=True),
    *same(
        vocab_size="vocab_size",
        hidden="hidden_size",
        layers="num_hidden_layers",
        max_seq_len="max_position_embeddings",
        norm_eps="rms_norm_eps",
        init_std="initializer_range",
        tied="tie_word_embeddings",
    ),
)
SIZES: tuple[ConfigRow, ...] = (*SIZES_BUT_FFN, Same("ffn", "intermediate_size"))
PLAIN = fixed(attention_scale=0.0, attention_softcap=0.0, embedding_scale=1.0, logit_softcap=0.0)
ATTENTION_BIAS = Mapped(
    ("qkv_bias", "out_bias"),
    ("attention_bias",),
    _attention_bias_to_hf,
    lambda hf: {"qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"]},
)
QKV_BIAS_ONLY = fixed(qkv_bias=True, out_bias=False)
NO_BIAS = fixed(qkv_bias=False, out_bias=False)
MLP_BIAS = Same("mlp_bias", "mlp_bias")
NO_MLP_BIAS = OnlyNative("mlp_bias", False)
DENSE = Mapped(("moe",), (), _dense_to_hf, lambda hf: {"moe": None})
WINDOW_KEYS = ("layer_types", "use_sliding_window", "sliding_window")
FULL_LAYERS = layer_rows(_full_to_hf, lambda hf: {"pattern": ["full"], "window": 0})
MISTRAL_LAYERS = layer_rows(_mistral_to_hf, _mistral_to_native, "sliding_window")
QWEN_MOE_LAYERS = layer_rows(_qwen_moe_to_hf, _mistral_to_native, "sliding_window", "use_sliding_window")
QWEN_LAYERS = layer_rows(_qwen_to_hf, _qwen_to_native, *WINDOW_KEYS)
GEMMA_LAYERS = layer_rows(_gemma_to_hf, _gemma_to_native, "layer_types", "sliding_window")
SMOLLM3_LAYERS = layer_rows(_smollm3_to_hf, _smollm3_to_native, "no_rope_layers", *WINDOW_KEYS)


def norms(kind: str = "rms", position: str = "pre", qk: str = "none") -> tuple[ConfigRow, ...]:
    return fixed(norm=kind, norm_position=position, qk_norm=qk)


def _gemma_scales_to_hf(native: Config) -> Config:
    if not math.isclose(native["embedding_scale"], native["hidden"] ** 0.5, rel_tol=1e-6):
        allowed = [f"sqrt(model.hidden) = {native['hidden'] ** 0.5}"]
        raise misfit("model.embedding_scale", native["embedding_scale"], allowed)
    scale = native["attention_scale"]
    scalar = scale**-2 if scale else _head_dim(native)
    if not math.isclose(scalar, round(scalar), rel_tol=1e-6):
        raise misfit("model.attention_scale", scale, ["0", "1/sqrt of a whole number"])
    return {"query_pre_attn_scalar": round(scalar)}


def _gemma_scales_to_native(hf: Config) -> Config:
    scalar = hf["query_pre_attn_scalar"]
    return {
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "attention_scale": 0.0 if scalar == hf["head_dim"] else scalar**-0.5,
    }


GEMMA_NUMBERS: tuple[ConfigRow, ...] = (
    Mapped(
        ("embedding_scale", "attention_scale"),
        ("query_pre_attn_scalar",),
        _gemma_scales_to_hf,
        _gemma_scales_to_native,
    ),
    Mapped(
        ("logit_softcap",),
        ("final_logit_softcapping",),
        lambda native: {"final_logit_softcapping": native["logit_softcap"] or None},
        lambda hf: {"logit_softcap": hf["final_logit_softcapping"] or 0.0},
    ),
    OnlyNative("attention_softcap", 0.0),
)


def _gpt2_heads_to_hf(native: Config) -> Config:
    _no_latent_attention(native)
    heads = native["heads"]
    if native["kv_heads"] not in (0, heads):
        raise misfit("model.kv_heads", native["kv_heads"], [0, heads])
    if _head_dim(native) * heads != native["hidden"]:
        raise misfit("model.head_dim", native["head_dim"], [0, native["hidden"] / heads])
    return {"n_head": heads}


GPT2_CONFIG: tuple[ConfigRow, ...] = (
    *fixed(family="decoder", gated=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
    *same(
        vocab_size="vocab_size",
        hidden="n_embd",
        layers="n_layer",
        max_seq_len="n_positions",
        norm_eps="layer_norm_epsilon",
        init_std="initializer_range",
        tied="tie_word_embeddings",
    ),
    Mapped(
        ("ffn",),
        ("n_inner",),
        lambda native: {"n_inner": None if native["ffn"] == 4 * native["hidden"] else native["ffn"]},
        lambda hf: {"ffn": hf["n_inner"] or 4 * hf["n_embd"]},
    ),
    Mapped(
        HEADS,
        ("n_head",),
        _gpt2_heads_to_hf,
        lambda hf: {"heads": hf["n_head"], "kv_heads": hf["n_head"], "head_dim": 0, "mla": None},
    ),
    activation("activation_function", "gelu_new"),
    Mapped(
        ("rope", "rope_local", "rotary_fraction"), (), lambda native: {}, lambda hf: {}
    ),  # unused: positions are learned
    DENSE,
    OnlyHf("scale_attn_weights", True),
    OnlyHf("scale_attn_by_inverse_layer_idx", False),
    OnlyHf("add_cross_attention", False),
    *PLAIN,
    *norms("layer"),
    FULL_LAYERS,
)

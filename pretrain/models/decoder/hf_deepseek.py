"""DeepSeek-V3 in Hugging Face's words: latent attention, experts in groups, a bias that chooses.

Pairs of rotated dims are neighbours on both sides (`rope_interleave`), so that tensors only change their names. A layer
for multi-token prediction, behind the last one, is left out, as transformers does itself.
"""

from typing import Any

from checkpoints.hf.brand import Brand, Config, ConfigRow, Mapped, OnlyHf, misfit
from checkpoints.hf.ops import Rename, Row, Stack
from checkpoints.hf.rope import rope_to_hf, rope_to_native
from pretrain.models.decoder.hf_config import (
    FULL_LAYERS,
    HEADS,
    NO_BIAS,
    NO_MLP_BIAS,
    PLAIN,
    SIZES,
    activation,
    fixed,
    norms,
)

LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "moe.router": "mlp.gate",
    "moe.shared.gate": "mlp.shared_experts.gate_proj",
    "moe.shared.up": "mlp.shared_experts.up_proj",
    "moe.shared.down": "mlp.shared_experts.down_proj",
}
TENSORS: tuple[Row, ...] = (
    Rename("embed.weight", "model.embed_tokens.weight"),
    *(Rename(f"layers.{{i}}.{ours}.weight", f"model.layers.{{i}}.{theirs}.weight") for ours, theirs in LAYER.items()),
    Rename("layers.{i}.moe.routing.bias", "model.layers.{i}.mlp.gate.e_score_correction_bias", keep_dtype=True),
    *(
        Stack(f"layers.{{i}}.moe.experts.{name}", f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight")
        for name in ("gate", "up", "down")
    ),
    Rename("norm.weight", "model.norm.weight"),
    Rename("head.weight", "lm_head.weight"),
)

MLA_KEYS = {
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
}

HEADS_OF_HF = (
    *MLA_KEYS.values(), "q_lora_rank", "head_dim", "qk_head_dim", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def _heads_to_hf(native: Config) -> Config:
    mla, heads = native["mla"], native["heads"]
    if mla is None:
        raise misfit("model.mla", None, ["set"])
    config = {theirs: mla[ours] for ours, theirs in MLA_KEYS.items()} | {"q_lora_rank": mla["q_rank"] or None}
    config |= {"head_dim": mla["rope_dim"], "qk_head_dim": mla["nope_dim"] + mla["rope_dim"]}
    return config | {"num_attention_heads": heads, "num_key_value_heads": heads}


def _heads_to_native(hf: Config) -> Config:
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    if kv_heads not in (None, heads):
        raise misfit("num_key_value_heads", kv_heads, [heads])
    mla = {ours: hf[theirs] for ours, theirs in MLA_KEYS.items()} | {"q_rank": hf["q_lora_rank"] or 0}
    return {"heads": heads, "kv_heads": 0, "head_dim": 0, "mla": mla}


def _rope_to_hf(native: Config) -> Config:
    rope = native["rope"]
    parameters = rope_to_hf(rope)
    if rope["scaling"] == "yarn":
        parameters |= {key: rope[key] for key in ("mscale", "mscale_all_dim") if rope[key]}
    return {"rope_parameters": parameters}


def _rope_to_native(hf: Config) -> Config:
    parameters = dict(hf["rope_parameters"])
    scales = {key: parameters.pop(key, None) or 0.0 for key in ("mscale", "mscale_all_dim")}
    rope = rope_to_native(parameters, "rope_parameters", hf["max_position_embeddings"])
    return {"rope": rope | scales}


MOE_KEYS = {
    "experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "ffn": "moe_intermediate_size",
    "first_dense": "first_k_dense_replace",
    "groups": "n_group",
    "top_groups": "topk_group",
    "normalize": "norm_topk_prob",
    "scale": "routed_scaling_factor",
}
MOE_FIXED: dict[str, Any] = {
    "every": 1, "shared_gate": False, "scores": "sigmoid", "choice": "token", "capacity": 0.0, "bias": True,
}  # fmt: skip
# Not in the config, as transformers does not train: what the paper has (arXiv:2412.19437, section 4.2).
TRAINING: dict[str, Any] = {"balance": "sequence", "balance_weight": 0.0001, "bias_rate": 0.001}


def _moe_to_hf(native: Config) -> Config:
    moe = native["moe"]
    if moe is None:
        raise misfit("model.moe", None, ["set"])
    for key, value in MOE_FIXED.items():
        if moe[key] != value:
            raise misfit(f"model.moe.{key}", moe[key], [value])
    if moe["top_groups"] < moe["groups"] and moe["group_score"] != "top2":
        raise misfit("model.moe.group_score", moe["group_score"], ["top2"])
    if not moe["shared_ffn"] or moe["shared_ffn"] % moe["ffn"]:
        raise misfit("model.moe.shared_ffn", moe["shared_ffn"], [f"multiples of model.moe.ffn = {moe['ffn']}"])
    shared = moe["shared_ffn"] // moe["ffn"]
    return {theirs: moe[ours] for ours, theirs in MOE_KEYS.items()} | {"n_shared_experts": shared}


def _moe_to_native(hf: Config) -> Config:
    moe = {ours: hf[theirs] for ours, theirs in MOE_KEYS.items()} | MOE_FIXED | TRAINING
    grouped = moe["groups"] > moe["top_groups"]
    shared = hf["n_shared_experts"] * moe["ffn"]
    return {"moe": moe | {"shared_ffn": shared, "group_score": "top2" if grouped else "max"}}


CONFIG: tuple[ConfigRow, ...] = (
    *SIZES,
    *norms(),
    Mapped(HEADS, HEADS_OF_HF, _heads_to_hf, _heads_to_native),
    Mapped(("rope",), ("rope_parameters",), _rope_to_hf, _rope_to_native),
    *fixed(rope_local=None, rotary_fraction=1.0, positions="rope"),
    Mapped(("moe",), (*MOE_KEYS.values(), "n_shared_experts"), _moe_to_hf, _moe_to_native),
    activation("hidden_act"),
    FULL_LAYERS,
    *NO_BIAS,
    NO_MLP_BIAS,
    *PLAIN,
    OnlyHf("attention_bias", False),
    OnlyHf("rope_interleave", True),
    Mapped((), ("num_nextn_predict_layers",), lambda native: {"num_nextn_predict_layers": 0}, lambda hf: {}),
)
DEEPSEEK_V3 = Brand(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    TENSORS,
    CONFIG,
    carried=("output_router_logits",),
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.layers.{layers}.*"),
)

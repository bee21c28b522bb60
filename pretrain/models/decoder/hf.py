"""Hugging Face key tables of the decoder brands.

Facts alone: what `save_pretrained` of transformers 5 writes for each architecture, beside what our decoder calls it.
"""

from typing import Any

from checkpoints.hf.brand import Brand, ConfigRow, OnlyHf
from checkpoints.hf.ops import Concat, Rename, Row
from pretrain.models.decoder.hf_config import (
    ATTENTION_BIAS,
    DENSE,
    FULL_LAYERS,
    GEMMA_LAYERS,
    GEMMA_NUMBERS,
    GPT2_CONFIG,
    MISTRAL_LAYERS,
    MLP_BIAS,
    NO_BIAS,
    NO_MLP_BIAS,
    PLAIN,
    QKV_BIAS_ONLY,
    QWEN_LAYERS,
    QWEN_MOE_LAYERS,
    SIZES,
    SIZES_BUT_FFN,
    SMOLLM3_LAYERS,
    activation,
    heads,
    norms,
    one_rope,
    rope_by_layer,
)
from pretrain.models.decoder.hf_deepseek import DEEPSEEK_V3
from pretrain.models.decoder.hf_moe import OLMOE_HEADS, QWEN_EXPERTS, STACKED, every_layer, expert_rows


def linear(ours: str, theirs: str) -> tuple[Row, Row]:
    """Weight and bias; the row of the bias is for models that have one."""
    return Rename(f"{ours}.weight", f"{theirs}.weight"), Rename(f"{ours}.bias", f"{theirs}.bias")


def layer_norms(**names: str) -> tuple[Row, ...]:
    return tuple(Rename(f"layers.{{i}}.{ours}.weight", f"model.layers.{{i}}.{hf}.weight") for ours, hf in names.items())


LLAMA_SHAPED: tuple[Row, ...] = (
    Rename("embed.weight", "model.embed_tokens.weight"),
    *linear("layers.{i}.attention.q", "model.layers.{i}.self_attn.q_proj"),
    *linear("layers.{i}.attention.k", "model.layers.{i}.self_attn.k_proj"),
    *linear("layers.{i}.attention.v", "model.layers.{i}.self_attn.v_proj"),
    *linear("layers.{i}.attention.out", "model.layers.{i}.self_attn.o_proj"),
    *linear("layers.{i}.mlp.gate", "model.layers.{i}.mlp.gate_proj"),
    *linear("layers.{i}.mlp.up", "model.layers.{i}.mlp.up_proj"),
    *linear("layers.{i}.mlp.down", "model.layers.{i}.mlp.down_proj"),
    Rename("norm.weight", "model.norm.weight"),
    Rename("head.weight", "lm_head.weight"),
)
PRE_NORMS = layer_norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
QK_NORMS: tuple[Row, ...] = (
    Rename("layers.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Rename("layers.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)
POST_NORMS = layer_norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
BOTH_NORMS = layer_norms(
    attention_norm="input_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
PROJECTIONS = expert_rows("mlp", "gate_proj", "up_proj", "down_proj")
QKV = tuple(f"layers.{{i}}.attention.{name}" for name in "qkv")
GPT2_TENSORS: tuple[Row, ...] = (
    Rename("embed.weight", "transformer.wte.weight"),
    Rename("pos_embed.weight", "transformer.wpe.weight"),
    *linear("layers.{i}.attention_norm", "transformer.h.{i}.ln_1"),
    Concat(tuple(f"{name}.weight" for name in QKV), "transformer.h.{i}.attn.c_attn.weight", transpose=True),
    Concat(tuple(f"{name}.bias" for name in QKV), "transformer.h.{i}.attn.c_attn.bias"),
    Rename("layers.{i}.attention.out.weight", "transformer.h.{i}.attn.c_proj.weight", transpose=True),
    Rename("layers.{i}.attention.out.bias", "transformer.h.{i}.attn.c_proj.bias"),
    *linear("layers.{i}.mlp_norm", "transformer.h.{i}.ln_2"),
    Rename("layers.{i}.mlp.up.weight", "transformer.h.{i}.mlp.c_fc.weight", transpose=True),
    Rename("layers.{i}.mlp.up.bias", "transformer.h.{i}.mlp.c_fc.bias"),
    Rename("layers.{i}.mlp.down.weight", "transformer.h.{i}.mlp.c_proj.weight", transpose=True),
    Rename("layers.{i}.mlp.down.bias", "transformer.h.{i}.mlp.c_proj.bias"),
    *linear("norm", "transformer.ln_f"),
    Rename("head.weight", "lm_head.weight"),
)


def llama_shaped(
    model_type: str,
    architecture: str,
    tensors: tuple[Row, ...],
    *config: ConfigRow,
    sizes: tuple[ConfigRow, ...] = SIZES,
    **more: Any,
) -> Brand:
    """A brand with Llama's skeleton: rotary positions, gated feed-forward, RMS norms."""
    return Brand(
        model_type,
        architecture,
        (*LLAMA_SHAPED, *tensors),
        (*sizes, *config),
        ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
        **more,
    )


LLAMA = llama_shaped(
    "llama", "LlamaForCausalLM", PRE_NORMS, *norms(), heads(even=True), activation("hidden_act"), *one_rope(),
    DENSE, FULL_LAYERS, ATTENTION_BIAS, MLP_BIAS, *PLAIN,
)  # fmt: skip
MISTRAL = llama_shaped(
    "mistral", "MistralForCausalLM", PRE_NORMS, *norms(), heads(), activation("hidden_act"), *one_rope(),
    DENSE, MISTRAL_LAYERS, *NO_BIAS, NO_MLP_BIAS, *PLAIN,
)  # fmt: skip
QWEN2 = llama_shaped(
    "qwen2", "Qwen2ForCausalLM", PRE_NORMS, *norms(), heads(), activation("hidden_act"), *one_rope(),
    DENSE, QWEN_LAYERS, *QKV_BIAS_ONLY, NO_MLP_BIAS, *PLAIN, carried=("max_window_layers",),
)  # fmt: skip
QWEN3 = llama_shaped(
    "qwen3", "Qwen3ForCausalLM", PRE_NORMS + QK_NORMS, *norms(qk="head"), heads(own_head_dim=True),
    activation("hidden_act"), *one_rope(), DENSE, QWEN_LAYERS, ATTENTION_BIAS, NO_MLP_BIAS, *PLAIN,
    carried=("max_window_layers",),
)  # fmt: skip
OLMO2 = llama_shaped(
    "olmo2", "Olmo2ForCausalLM", POST_NORMS + QK_NORMS, *norms(position="post", qk="full"), heads(),
    activation("hidden_act"), *one_rope(), DENSE, FULL_LAYERS, ATTENTION_BIAS, NO_MLP_BIAS, *PLAIN,
)  # fmt: skip
GEMMA3 = llama_shaped(
    "gemma3_text", "Gemma3ForCausalLM", BOTH_NORMS + QK_NORMS, *norms("rms_unit", "both", "head"),
    heads(even=True, own_head_dim=True), activation("hidden_activation"), *rope_by_layer(), GEMMA_LAYERS,
    DENSE, ATTENTION_BIAS, NO_MLP_BIAS, *GEMMA_NUMBERS,
    OnlyHf("attn_logit_softcapping", None),  # transformers 5 keeps the key but does not apply it
    OnlyHf("use_bidirectional_attention", False),
    carried=("_sliding_window_pattern", "sliding_window_pattern"),
)  # fmt: skip
SMOLLM3 = llama_shaped(
    "smollm3", "SmolLM3ForCausalLM", PRE_NORMS, *norms(), heads(), activation("hidden_act"), *one_rope(),
    DENSE, SMOLLM3_LAYERS, ATTENTION_BIAS, MLP_BIAS, *PLAIN, carried=("no_rope_layer_interval", "max_window_layers"),
)  # fmt: skip
MIXTRAL = llama_shaped(
    "mixtral", "MixtralForCausalLM", PRE_NORMS + expert_rows("block_sparse_moe", "w1", "w3", "w2"), *norms(), heads(),
    activation("hidden_act"), *one_rope(), every_layer("num_local_experts", None), MISTRAL_LAYERS, *NO_BIAS,
    NO_MLP_BIAS, *PLAIN, OnlyHf("router_jitter_noise", 0.0), sizes=SIZES_BUT_FFN, also=STACKED,
    carried=("output_router_logits",),
)  # fmt: skip
QWEN3_MOE = llama_shaped(
    "qwen3_moe", "Qwen3MoeForCausalLM", PRE_NORMS + QK_NORMS + PROJECTIONS, *norms(qk="head"), heads(),
    activation("hidden_act"), *one_rope(), QWEN_EXPERTS, QWEN_MOE_LAYERS, ATTENTION_BIAS, NO_MLP_BIAS, *PLAIN,
    also=STACKED, carried=("output_router_logits", "max_window_layers"),
)  # fmt: skip
OLMOE = llama_shaped(
    "olmoe", "OlmoeForCausalLM", PRE_NORMS + QK_NORMS + PROJECTIONS, *norms(qk="full"), OLMOE_HEADS,
    activation("hidden_act"), *one_rope(), every_layer("num_experts", "norm_topk_prob"), FULL_LAYERS, ATTENTION_BIAS,
    NO_MLP_BIAS, *PLAIN, OnlyHf("clip_qkv", None), sizes=SIZES_BUT_FFN, also=STACKED,
    carried=("output_router_logits",),
)  # fmt: skip
GPT2 = Brand(
    "gpt2", "GPT2LMHeadModel", GPT2_TENSORS, GPT2_CONFIG, prefix="transformer.",
    carried=(
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "reorder_and_upcast_attn",
    ),
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
)  # fmt: skip

# In the order in which an export looks for one that fits.
BRANDS: dict[str, Brand] = {
    brand.model_type: brand
    for brand in (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA3, SMOLLM3, MIXTRAL, QWEN3_MOE, OLMOE, GPT2, DEEPSEEK_V3)
}

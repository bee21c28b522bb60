"""Tiny Hugging Face models that give mapping mistakes away: no two dimensions alike, nothing at its initial value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from launch.cli import main

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
VOCAB = 307
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {  # heads * head_dim = 60, kv heads * head_dim = 20
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128,
} | TOKEN_IDS  # fmt: skip
ODD = WIDE | {"hidden_size": 50}  # where transformers lets heads not divide the width
MOE = WIDE | {"hidden_size": 52}  # transformers multiplies experts of whole 16 bytes alone
SQUARE = {key: value for key, value in WIDE.items() if key != "head_dim"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}
GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_positions": 128} | TOKEN_IDS
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 5e3, "factor": 3.0, "original_max_position_embeddings": 24, "beta_fast": 16.0,
    "beta_slow": 2.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 2e3, "factor": 2.5}


@dataclass(frozen=True)
class Case:
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": parameters}


CASES = {
    "llama2": Case("llama", WIDE | {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama3": Case("llama", WIDE | rope(LLAMA3) | {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", WIDE | rope(LINEAR) | {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": Case("llama", WIDE | rope(YARN | {"attention_factor": 1.3}) | {"hidden_act": "gelu"}),
    "mistral": Case("mistral", ODD | {"sliding_window": 9}),
    "mistral-full": Case("mistral", ODD | {"sliding_window": None}),
    "qwen2": Case("qwen2", ODD | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen2-full": Case("qwen2", ODD | rope(YARN) | {"max_window_layers": 4}),
    "qwen3": Case("qwen3", ODD | {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-sliding": Case("qwen3", ODD | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "olmo2": Case("olmo2", ODD | {"rms_norm_eps": 1e-4}),
    "olmo2-mscale": Case("olmo2", ODD | rope(YARN | {"mscale": 0.7, "mscale_all_dim": 0.3})),
    "gemma3": Case(
        "gemma3_text",
        WIDE | {"sliding_window": 9, "sliding_window_pattern": 3, "query_pre_attn_scalar": 7, "num_hidden_layers": 5},
    ),
    "gemma3-scaled": Case(
        "gemma3_text",
        WIDE
        | rope({"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}})
        | {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 10}
        | {"final_logit_softcapping": 3.0},
    ),
    "smollm3": Case("smollm3", ODD | {"no_rope_layer_interval": 3, "mlp_bias": True, "rms_norm_eps": 1e-4}),
    "smollm3-list": Case("smollm3", ODD | {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False}),
    "mixtral": Case("mixtral", MOE | {"num_experts_per_tok": 2, "num_local_experts": 5, "router_aux_loss_coef": 0.03}),
    "mixtral-window": Case("mixtral", MOE | {"num_local_experts": 3, "sliding_window": 9, "num_experts_per_tok": 1}),
    "qwen3-moe": Case("qwen3_moe", MOE | EXPERTS | {"num_experts": 5, "norm_topk_prob": True}),
    "qwen3-moe-some": Case(
        "qwen3_moe",
        MOE
        | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "mlp_only_layers": [0]}
        | {"attention_bias": True, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7},
    ),
    "qwen3-moe-step": Case("qwen3_moe", MOE | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2}),
    "olmoe": Case("olmoe", SQUARE | {"num_experts": 7, "num_experts_per_tok": 2}),
    "olmoe-normalised": Case("olmoe", SQUARE | {"num_experts": 8, "norm_topk_prob": True, "attention_bias": True}),
    "gpt2": Case("gpt2", GPT2 | {"n_head": 6}),
    "gpt2-untied": Case(
        "gpt2",
        GPT2 | {"n_head": 4, "n_inner": 76, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
}  # fmt: skip


def make_model(case: Case, seed: int = 0) -> Any:
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_model(case: Case, folder: Path, *, shard_size: str = "5GB", seed: int = 0) -> Path:
    make_model(case, seed).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, model="bpe", vocab_size=300)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def checkpoint_command(*words: Any) -> int:
    """`pretrain checkpoint ...` in this process, errors raised; returns the exit code."""
    return main(["--debug", "checkpoint", *map(str, words)])

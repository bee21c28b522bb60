"""A decoder as Megatron-Core builds it: arguments, table of weights, and our own attention and routing in it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.engines.megatron_facts import MegatronFacts, Row
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.decoder.model import Rotation, by_kind, make_core
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.layers.mla import LATENT_EPS, MLA
from pretrain.models.layers.mlp import ACTIVATIONS
from pretrain.models.layers.moe import MoE, RouterLinear, Routing
from pretrain.models.layers.norm import make_norm
from pretrain.models.layers.rope import rotate

ENDS = {
    "embedding.word_embeddings": Row(("embed",)),
    "embedding.position_embeddings": Row(("pos_embed",)),
    "decoder.final_layernorm": Row(("norm",)),
    "output_layer": Row(("head",)),
}
BLOCK = {
    "input_layernorm": Row(("attention_norm",)),
    "self_attention.linear_qkv": Row(("attention.q", "attention.k", "attention.v"), "groups"),
    "self_attention.q_layernorm": Row(("attention.q_norm",)),
    "self_attention.k_layernorm": Row(("attention.k_norm",)),
    "self_attention.linear_proj": Row(("attention.out",)),
    "self_attention.linear_q_proj": Row(("attention.q",)),
    "self_attention.linear_q_down_proj": Row(("attention.q_down",)),
    "self_attention.linear_q_up_proj": Row(("attention.q_up",)),
    "self_attention.linear_kv_down_proj": Row(("attention.kv_down",)),
    "self_attention.kv_layernorm": Row(("attention.kv_norm",)),
    "self_attention.linear_kv_up_proj": Row(("attention.kv_up",)),
    "pre_mlp_layernorm": Row(("mlp_norm",)),
    "mlp.linear_fc2": Row(("mlp.down",)),
    "mlp.router.inner": Row(("moe.router",)),
    "mlp.router.inner.routing": Row(("moe.routing",)),
    "mlp.experts.local_experts.*.linear_fc1.weight": Row(("moe.experts.gate", "moe.experts.up"), "rows", stacked=True),
    "mlp.experts.local_experts.*.linear_fc2.weight": Row(("moe.experts.down",), stacked=True),
    "mlp.shared_experts.linear_fc1": Row(("moe.shared.gate", "moe.shared.up"), "rows"),
    "mlp.shared_experts.linear_fc2": Row(("moe.shared.down",)),
    "mlp.shared_experts.gate_weight": Row(("moe.shared_gate.weight",)),
}
GATED = {"mlp.linear_fc1": Row(("mlp.gate", "mlp.up"), "rows")}
PLAIN = {"mlp.linear_fc1": Row(("mlp.up",))}


def facts(cfg: DecoderConfig) -> MegatronFacts:
    """Raises ValueError for what Megatron-Core's modules have no place for."""
    check(cfg)
    arguments: dict[str, Any] = {
        "num_layers": cfg.layers,
        "hidden_size": cfg.hidden,
        "ffn_hidden_size": cfg.ffn,
        "num_attention_heads": cfg.heads,
        "num_query_groups": cfg.num_kv_heads,
        "kv_channels": cfg.dim_per_head,
        "activation_func": ACTIVATIONS[cfg.activation],
        "gated_linear_unit": cfg.gated,
        "add_bias_linear": cfg.mlp_bias,
        "add_qkv_bias": cfg.qkv_bias,
        "normalization": "LayerNorm" if cfg.norm == "layer" else "RMSNorm",
        "layernorm_epsilon": cfg.norm_eps,
        "qk_layernorm": cfg.qk_norm == "head",
    }
    if cfg.moe is not None:
        arguments |= _experts(cfg.moe)
    if cfg.mla is not None:
        arguments |= _latents(cfg.mla)
    return MegatronFacts(
        cfg=cfg,
        arguments=arguments,
        vocab_size=cfg.vocab_size,
        max_seq_len=cfg.max_seq_len,
        tied=cfg.tied,
        learned_positions=cfg.positions == "learned",
        sparse=tuple(cfg.sparse(index) for index in range(cfg.layers)),
        norm=lambda width: make_norm(cfg.norm, width, cfg.norm_eps),
        core=lambda index: RotatedCore(cfg, index) if cfg.mla is None else LatentCore(cfg, index),
        context=lambda mask, positions: Context(*by_kind(cfg, mask, positions)),
        ends=ENDS,
        block=BLOCK | (GATED if cfg.gated else PLAIN),
        router=None if cfg.moe is None else lambda hidden: Router(cfg.moe, hidden),  # type: ignore[arg-type]
        routing="moe.routing",
        kv_heads=cfg.num_kv_heads,
        embedding_scale=cfg.embedding_scale,
        qk_norm=cfg.qk_norm == "head",
        latent_norm=None if cfg.mla is None else lambda width: make_norm(cfg.norm, width, LATENT_EPS),
    )


def check(cfg: DecoderConfig) -> None:
    """Raises ValueError that names the key."""
    biases = {"mlp_bias": cfg.mlp_bias, "out_bias": cfg.out_bias}
    wrong = {
        "norm_position": cfg.norm_position != "pre" and f"{cfg.norm_position!r} norms have no place in its layers",
        "qk_norm": cfg.qk_norm == "full" and '"full" has no place in its attention, "head" has',
        "out_bias": cfg.mlp_bias != cfg.out_bias and f"{biases}: all its linear layers have a bias or none",
        "qkv_bias": cfg.mlp_bias
        and not (cfg.qkv_bias or cfg.mla)
        and "false, but mlp_bias true gives all its linear layers one",
    }
    if cfg.moe is not None:
        wrong |= {
            "moe.choice": cfg.moe.choice == "expert" and '"expert": its dispatcher sends top_k rows of each token',
            "moe.capacity": cfg.moe.capacity > 0 and f"{cfg.moe.capacity}: its dispatcher sends top_k rows of a token",
            "mlp_bias": cfg.mlp_bias and "true: its experts have none",
        }
    for key, reason in wrong.items():
        if reason:
            raise ValueError(f'engine = "megatron" cannot do model.{key}: {reason}; take engine = "torch", which can')


def _experts(moe: MoE) -> dict[str, Any]:
    """The router is ours, so that only sizes are left to say."""
    return {
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn,
        "moe_shared_expert_intermediate_size": moe.shared_ffn or None,
        "moe_shared_expert_gate": moe.shared_gate,
    }


def _latents(mla: MLA) -> dict[str, Any]:
    """Scores are scaled and positions rotated in our core: what Megatron has for that is not used."""
    return {
        "q_lora_rank": mla.q_rank or None,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
        "rope_type": "rope",
    }


class Context(NamedTuple):
    """Of a micro-batch, by kind of layer."""

    masks: dict[str, AttentionMask]
    rotations: dict[str, Rotation | None]


class RotatedCore(nn.Module):
    """Rotation and attention of one layer: positions and masks are a micro-batch's own, documents included."""

    def __init__(self, cfg: DecoderConfig, index: int):
        super().__init__()
        self.kind = cfg.layer_kind(index)
        self.core = make_core(cfg)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        rotation = context.rotations[self.kind]
        if rotation is not None:
            q, k = self.rotated(q, k, rotation)
        out: Tensor = self.core(q, k, v, context.masks[self.kind])
        return out

    def rotated(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(q, *rotation), rotate(k, *rotation)


class LatentCore(RotatedCore):
    """The last dims of a head are rotated; those of keys are the same in all heads."""

    def __init__(self, cfg: DecoderConfig, index: int):
        super().__init__(cfg, index)
        assert cfg.mla is not None
        self.parts = [cfg.mla.nope_dim, cfg.mla.rope_dim]

    def rotated(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        (q_nope, q_rope), (k_nope, k_rope) = (x.split(self.parts, dim=-1) for x in (q, k))
        q_rope = rotate(q_rope, *rotation, neighbours=True)
        k_rope = rotate(k_rope[:, :, :1], *rotation, neighbours=True).expand_as(k_rope)
        return torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1)


class Router(RouterLinear):
    """x [B, S, H] -> probabilities of experts [B, S, E], 0 where not chosen, and which are chosen."""

    def __init__(self, moe: MoE, hidden: int):
        super().__init__(hidden, moe.experts, moe.precision)
        self.routing = Routing(moe)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        routes = self.routing(logits)
        numbers = torch.arange(logits.shape[-1], device=x.device)
        expert = numbers.repeat_interleave(routes.counts)[routes.slots]  # of each token's rows: [T, K]
        zeros = torch.zeros_like(logits).flatten(0, 1)
        probs = zeros.scatter(1, expert, routes.weight.to(zeros.dtype))
        chosen = zeros.bool().scatter(1, expert, True)
        return probs.view_as(logits), chosen.view_as(logits)

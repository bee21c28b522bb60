"""How a decoder is spread over processes."""

from parallel.plan import Plan, Style
from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.layers.mla import MLA


def plan(cfg: DecoderConfig) -> Plan:
    """Sharding plan of a decoder with this config."""
    block = _attention(cfg) if cfg.mla is None else _latent_attention(cfg.mla)
    sparse = [cfg.sparse(i) for i in range(cfg.layers)]
    if not all(sparse):
        block |= _feed_forward("mlp", cfg.gated)
    if any(sparse):
        assert cfg.moe is not None
        block |= {"moe.router": "sequence", "moe.experts": "experts"}
        if cfg.moe.shared_ffn:
            block |= _feed_forward("moe.shared", True)
        if cfg.moe.shared_gate:
            block["moe.shared_gate"] = "sequence"
    if cfg.norm_position in ("pre", "both"):
        block |= {"attention_norm": "sequence", "mlp_norm": "sequence"}
    if cfg.norm_position in ("post", "both"):
        block |= {"attention_post_norm": "sequence", "mlp_post_norm": "sequence"}
    ends: dict[str, Style] = {"embed": "vocabulary", "norm": "sequence", "head": "head"}
    if cfg.positions == "learned":
        ends["pos_embed"] = "position"
    return Plan(
        blocks="layers.*",
        tensor={f"layers.*.{name}": style for name, style in block.items()} | ends,
        first=("embed", "pos_embed"),
        last=("norm", "head"),
        attention="layers.*.attention.core",
        tied={"head.weight": "embed.weight"} if cfg.tied else {},
        heads=cfg.heads,
        kv_heads=cfg.num_kv_heads,
        hidden=cfg.hidden,
        routing="layers.*.moe.routing" if any(sparse) else "",
        experts=cfg.moe.experts if cfg.moe is not None else 0,
    )


def _attention(cfg: DecoderConfig) -> dict[str, Style]:
    rows: dict[str, Style] = {
        "attention": "gather",
        "attention.q": "column",
        "attention.k": "key_value",
        "attention.v": "key_value",
        "attention.out": "row",
    }
    if cfg.qk_norm != "none":
        style: Style = "head_norm" if cfg.qk_norm == "head" else "width_norm"
        rows |= {"attention.q_norm": style, "attention.k_norm": style}
    return rows


def _latent_attention(mla: MLA) -> dict[str, Style]:
    """Latents are made of sequence parts; they are gathered, being narrow, and not the stream."""
    rows: dict[str, Style] = {
        "attention.kv_down": "sequence",
        "attention.kv_norm": "sequence",
        "attention.kv_up": "part_column",
        "attention.shared": "share",
        "attention.out": "row",
    }
    if not mla.q_rank:
        return rows | {"attention.q": "part_column"}
    return rows | {"attention.q_down": "sequence", "attention.q_norm": "sequence", "attention.q_up": "part_column"}


def _feed_forward(name: str, gated: bool) -> dict[str, Style]:
    rows: dict[str, Style] = {name: "gather", f"{name}.up": "column", f"{name}.down": "row"}
    return rows | ({f"{name}.gate": "column"} if gated else {})

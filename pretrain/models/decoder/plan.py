"""How a decoder is spread over processes."""

from parallel.plan import Plan, Style
from pretrain.models.decoder.config import DecoderConfig


def plan(cfg: DecoderConfig) -> Plan:
    """Sharding plan of a decoder with this config."""
    block: dict[str, Style] = {
        "attention": "gather",
        "attention.q": "column",
        "attention.k": "key_value",
        "attention.v": "key_value",
        "attention.out": "row",
        "mlp": "gather",
        "mlp.up": "column",
        "mlp.down": "row",
    }
    if cfg.gated:
        block["mlp.gate"] = "column"
    if cfg.qk_norm != "none":
        style: Style = "head_norm" if cfg.qk_norm == "head" else "width_norm"
        block |= {"attention.q_norm": style, "attention.k_norm": style}
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
    )

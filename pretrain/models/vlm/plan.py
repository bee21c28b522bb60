"""How a vision-language model is spread over processes: the decoder's plan, and the tower's under its name."""

from dataclasses import replace

from parallel.plan import Plan, Style
from pretrain.models.decoder.plan import plan as decoder_plan
from pretrain.models.vlm.config import VLMConfig
from pretrain.models.vlm.tower import VisionConfig


def plan(cfg: VLMConfig) -> Plan:
    """Sharding plan of a model with this config. The first pipeline stage has the tower."""
    decoder = decoder_plan(cfg)
    rows: dict[str, Style] = {"features": "share", "slots": "position"}
    rows |= {f"connector.{name}": style for name, style in _connector(cfg).items()}
    if cfg.vision is not None:
        rows |= {f"vision.{name}": style for name, style in tower_rows(cfg.vision).items()}
    heads = [cfg.vision.heads] if cfg.vision is not None else []
    heads += [cfg.connector.heads] if cfg.connector.kind == "resampler" else []
    return replace(
        decoder,
        tensor={**decoder.tensor, **rows},
        first=(*decoder.first, "vision", "connector", "features", "slots"),
        # Blocks past the output never run: FSDP would wait for them in a pipeline's backward.
        towers=() if cfg.vision is None else tuple(f"vision.layers.{i}" for i in range(cfg.vision.used)),
        tower_heads=tuple(heads),
    )


def tower_rows(cfg: VisionConfig) -> dict[str, Style]:
    """Of a vision tower, whose rows of patches are cut as sequences are."""
    rows: dict[str, Style] = {
        "patch_embed": "position",
        "flags": "position",
        "norm": "sequence",
        "layers.*.attention": "gather",
        "layers.*.attention.q": "column",
        "layers.*.attention.k": "column",
        "layers.*.attention.v": "column",
        "layers.*.attention.out": "row",
        "layers.*.mlp": "gather",
        "layers.*.mlp.up": "column",
        "layers.*.mlp.down": "row",
        "layers.*.attention_norm": "sequence",
        "layers.*.mlp_norm": "sequence",
    }
    if cfg.class_token:
        rows["class_embed"] = "sequence"
    if cfg.positions == "learned":
        rows["pos_embed"] = "position"
    if cfg.first_norm:
        rows["first_norm"] = "sequence"
    return rows


def _connector(cfg: VLMConfig) -> dict[str, Style]:
    first: Style = "position" if cfg.vision is None else "sequence"  # patches come as whole rows
    if cfg.connector.kind == "linear":
        return {"project": first}
    if cfg.connector.kind == "mlp":
        return {"up": first, "down": "sequence"}
    parts: dict[str, Style] = dict.fromkeys(("q", "k", "v"), "part_column")
    return {"queries": "position", "project": first, **parts, "out": "row"}

"""How a vision transformer is spread over processes: rows of patches are cut as sequences are, its end sees them whole.

Context parallelism leaves the class token, and with it the loss, to the first process; a mean of patches has no such
place, and is refused there.
"""

from parallel.plan import Plan
from pretrain.models.vit.config import ViTConfig
from pretrain.models.vit.model import STEM
from pretrain.models.vlm.plan import tower_rows


def plan(cfg: ViTConfig) -> Plan:
    """Sharding plan of a classifier with this config."""
    return Plan(
        blocks="layers.*",
        tensor={**tower_rows(cfg.vision), "rows": "collect", "head": "whole"},
        first=STEM,
        last=("norm", "rows", "head"),
        attention="layers.*.attention.core",
        heads=cfg.vision.heads,
        kv_heads=cfg.vision.heads,
        hidden=cfg.vision.hidden,
    )

"""How a dual encoder is spread over processes: both towers as they are elsewhere, their ends on whole rows.

Under tensor parallelism each process of a group has all features of the group's samples and compares them alike. The
objective, which compares samples of all processes, takes no pipeline and no context parallelism
(`parallel.across.check_across`).
"""

import math
from dataclasses import replace

from parallel.plan import Plan, Style
from pretrain.models.decoder.plan import plan as decoder_plan
from pretrain.models.dual.config import DualConfig
from pretrain.models.vlm.plan import tower_rows

POOL = ("probe_embed", "q", "k", "v", "out", "norm", "mlp.up", "mlp.down")


def plan(cfg: DualConfig) -> Plan:
    """Sharding plan of a dual encoder with this config."""
    text = decoder_plan(cfg)
    rows: dict[str, Style] = {name: style for name, style in text.tensor.items() if name != "head"}
    rows |= {f"vision.{name}": style for name, style in tower_rows(cfg.vision).items()}
    rows |= {"image_rows": "collect", "text_rows": "collect", "text_head": "whole", "log_scale": "whole"}
    if cfg.logit_bias is not None:
        rows["offset"] = "whole"
    if cfg.image_head:
        rows["image_head"] = "whole"
    if cfg.image_pool == "map":
        rows |= {f"pool.{name}": "whole" for name in POOL}
    return replace(
        text,
        tensor=rows,
        first=(),
        last=(),
        tied={},
        towers=("vision.layers.*",),
        tower_heads=(cfg.vision.heads,),
        largest={"log_scale.weight": math.log(cfg.max_logit_scale)} if cfg.max_logit_scale else {},
    )

"""A recipe's small likeness: the same structure in a size that a laptop computes in a second."""

import math
from dataclasses import is_dataclass, replace
from typing import Any

from pydantic import BaseModel

from pretrain.config import RunConfig

HEAD_DIM, VOCABULARY, TOKENS = 8, 128, 48  # about; each is raised to what the degrees need
Change = tuple[str, Any, Any]  # key, before, after


def shrink(config: RunConfig, degrees: dict[str, int], processes: int) -> tuple[RunConfig, list[Change]]:
    """The recipe with small dims, and what was changed.

    Kept: the ratio of query to key/value heads, their divisibility by any degree that divides `processes`, the
    pattern of layers, ties, biases, norms, the remainder of vocabulary and feed-forward by `processes` and of the
    sequence by what cuts it. `degrees` are those of the layout, or the largest of several layouts. Dims of the model
    are known by their names; what a family calls otherwise stays as it is.
    """
    model = config.model
    values: dict[str, Any] = {}
    heads = getattr(model, "num_kv_heads", 0) or getattr(model, "heads", 1)
    ratio = getattr(model, "heads", heads) // heads
    kept_heads = math.gcd(heads, processes)  # divided by the same degrees
    head_dim = HEAD_DIM if kept_heads * ratio <= 16 else HEAD_DIM // 2
    unit = processes * -(-HEAD_DIM // processes)
    width = getattr(model, "hidden", 0)
    hidden = kept_heads * ratio * head_dim
    if getattr(model, "head_dim", 0):  # the width need not be that of all heads
        hidden = _dim(round(width * hidden / (heads * ratio * model.head_dim)), unit)
    for name, value in model:
        if not isinstance(value, int) or isinstance(value, bool) or not value:
            continue
        if name == "kv_heads":
            values[name] = kept_heads
        elif name == "heads":
            values[name] = kept_heads * ratio
        elif name == "head_dim":
            values[name] = head_dim
        elif name == "hidden" and hidden:
            values[name] = hidden
        elif name.endswith("ffn") and width:
            values[name] = _dim(round(value * hidden / width), unit) + value % processes
        elif name == "layers":
            values[name] = _layers(config, degrees["pp"])
        elif name == "vocab_size":
            values[name] = _dim(VOCABULARY, processes) + value % processes
    mla = getattr(model, "mla", None)
    if mla is not None:
        values["mla"] = _narrow_latents(mla, head_dim)
    moe = getattr(model, "moe", None)
    if moe is not None:
        values["moe"] = _few_experts(moe, processes, hidden / width)
    pictures: dict[str, Any] = {}
    if config.data.patches:
        values |= _small_pictures(model, processes)
        connector = getattr(model, "connector", None)
        merged = connector.merge**2 if connector is not None else 1
        pictures["patches"] = _dim(TOKENS, merged * degrees["tp"])
    seq_len = _dim(TOKENS, 2 * degrees["cp"] * degrees["tp"]) + config.data.seq_len % (
        2 * degrees["cp"] * degrees["tp"]
    )
    if hasattr(model, "max_seq_len"):
        values["max_seq_len"] = max(seq_len, values.get("max_seq_len", 0))
    else:  # its rows are patches, its blocks the tower's
        seq_len = pictures["patches"] = min(seq_len, config.data.seq_len)
        values["vision"] = values["vision"].model_copy(update={"layers": _layers(config, degrees["pp"])})
    if getattr(model, "window", 0):
        values["window"] = max(2, seq_len // 5)
    if not model.vocab_size:
        values["vocab_size"] = _dim(VOCABULARY, processes)
    numbers = {name for name, value in values.items() if isinstance(value, int)}
    values = {name: v for name, v in values.items() if name not in numbers or not 0 < getattr(model, name) < v}
    if getattr(model, "init_std", 0) and hidden:
        # At a small width the usual 0.02 makes attention all but uniform: wrong masks and positions would hardly show.
        values["init_std"] = max(model.init_std, round(hidden**-0.5, 3))
    objective = config.objective
    if hasattr(objective, "chunk_tokens"):  # several chunks of logits, as the real run has
        objective = objective.model_copy(update={"chunk_tokens": 40})
    if hasattr(objective, "chunk_rows"):
        objective = objective.model_copy(update={"chunk_rows": 3})
    stages = tuple(min(count, 2) for count in config.parallel.stage_layers)
    deepspeed = config.deepspeed
    if config.engine == "deepspeed":  # or ZeRO 3 would cut none of parameters as small as these
        deepspeed = deepspeed.model_copy(update={"persistent": 0})
    small = config.model_copy(
        update={
            "model": type(model).model_validate(model.model_dump() | values),
            "objective": objective,
            "data": config.data.model_copy(update={"seq_len": min(seq_len, config.data.seq_len), **pictures}),
            "parallel": config.parallel.model_copy(update={"stage_layers": stages}),
            "deepspeed": deepspeed,
        }
    )
    return small, changes(config, small)


def changes(before: RunConfig, after: RunConfig) -> list[Change]:
    """Settings of model, data, layout and engine that differ."""
    found = []
    for section in ("model", "data", "parallel", "deepspeed"):
        old, new = getattr(before, section), getattr(after, section)
        found += _differences(section, dict(old), dict(new))
    return found


def _differences(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    found: list[Change] = []
    for key, after in new.items():
        before = old[key]
        if is_dataclass(before) and is_dataclass(after):
            found += _differences(f"{where}.{key}", vars(before), vars(after))
        elif isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += _differences(f"{where}.{key}", dict(before), dict(after))
        elif before != after:
            found.append((f"{where}.{key}", before, after))
    return found


def _small_pictures(model: Any, processes: int) -> dict[str, Any]:
    """Of tower, patches and connector; no two widths alike."""
    found: dict[str, Any] = {"patches": model.patches.model_copy(update={"size": 2})}
    connector = getattr(model, "connector", None)
    merge = 1
    if connector is not None:
        merge = connector.merge
        dims = {
            "ffn": _dim(40, processes) if connector.ffn else 0,
            "queries": min(connector.queries, 4),
            "heads": math.gcd(connector.heads, processes),
        }
        found["image_token"] = 1  # within the small vocabulary
        found["connector"] = connector.model_copy(update=dims)
    if model.vision is None:
        return found
    vision = model.vision
    heads = math.gcd(vision.heads, processes)
    layers = min(vision.layers, 2 - vision.output_layer - 1)
    grid = tuple(min(side, max(merge, 4)) for side in vision.grid)
    dims = {"heads": heads, "hidden": heads * HEAD_DIM, "ffn": _dim(24, processes), "layers": layers, "grid": grid}
    if hasattr(model, "features"):
        found["features"] = 20 if model.image_head else dims["hidden"]
    return found | {"vision": vision.model_copy(update=dims)}


def _few_experts(moe: Any, processes: int, scale: float) -> Any:
    """Groups stay, and which degrees divide the experts; a token takes at most two, of at least four. The balancing
    loss is raised, or a wrong one would hardly show.
    """
    unit = math.lcm(moe.groups * (1 if moe.group_score == "max" else 2), math.gcd(moe.experts, processes))
    experts = min(_dim(4, unit), moe.experts)
    top_k = min(moe.top_k, 2, moe.top_groups * (experts // moe.groups))
    ffn, shared = (_dim(round(size * scale), processes) if size else 0 for size in (moe.ffn, moe.shared_ffn))
    return replace(
        moe,
        experts=experts,
        top_k=top_k,
        ffn=ffn,
        shared_ffn=shared,
        first_dense=min(moe.first_dense, 1),
        balance_weight=max(moe.balance_weight, 0.1) if moe.balance_weight else 0.0,
    )


def _narrow_latents(mla: Any, head_dim: int) -> Any:
    """No two widths alike, whatever they are in the recipe; queries stay compressed or not."""
    widths = {
        "q_rank": head_dim * 3,
        "kv_rank": head_dim * 2,
        "nope_dim": head_dim,
        "rope_dim": 4,
        "v_dim": head_dim - 1,
    }
    return replace(mla, **{name: min(getattr(mla, name), width) for name, width in widths.items()})


def _dim(size: int, unit: int) -> int:
    return max(1, -(-size // unit)) * unit


def _layers(config: RunConfig, pp: int) -> int:
    if config.parallel.stage_layers:
        return sum(min(count, 2) for count in config.parallel.stage_layers)
    layers = config.model.layers
    stages = pp * max(config.parallel.stages_per_rank, 2) if pp > 1 else 2
    wanted = max(stages, len(getattr(config.model, "pattern", ())))
    if getattr(config.model, "moe", None) is not None:
        wanted = max(wanted, min(config.model.moe.first_dense, 1) + config.model.moe.every)
    return min(layers, wanted + (layers % pp if pp > 1 else 0))

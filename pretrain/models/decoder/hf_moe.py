"""Rows of the brands whose experts are softmax-routed: Mixtral, Qwen3-MoE, OLMoE."""

from typing import Any

from checkpoints.hf.brand import Config, ConfigRow, Mapped, misfit
from checkpoints.hf.ops import Concat, Rename, Row, Stack
from pretrain.models.decoder.hf_config import HEADS, heads

# What routers and experts are in all of them.
FIXED: dict[str, Any] = {
    "scores": "softmax", "scale": 1.0, "choice": "token", "capacity": 0.0, "bias": False, "shared_ffn": 0,
    "shared_gate": False,
}  # fmt: skip
# Of training alone, or without effect where all groups may be used.
FREE = {"precision", "balance", "balance_weight", "z_weight", "bias_rate", "groups", "top_groups", "group_score"}
OWN = {"experts", "top_k", "ffn", "first_dense", "every", "normalize"}

EXPERTS = "layers.{i}.moe.experts"


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """As `save_pretrained` writes: one tensor an expert. block: what the module of router and experts is called."""
    experts = f"model.layers.{{i}}.{block}.experts.{{e}}"
    return (
        Rename("layers.{i}.moe.router.weight", f"model.layers.{{i}}.{block}.gate.weight"),
        Stack(f"{EXPERTS}.gate", f"{experts}.{gate}.weight"),
        Stack(f"{EXPERTS}.up", f"{experts}.{up}.weight"),
        Stack(f"{EXPERTS}.down", f"{experts}.{down}.weight"),
    )


# As transformers 5 has them in memory and writes with `save_original_format=False`: gate_up [E, 2F, H], down [E, H, F].
STACKED: tuple[Row, ...] = (
    Rename("layers.{i}.moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    Concat((f"{EXPERTS}.gate", f"{EXPERTS}.up"), "model.layers.{i}.mlp.experts.gate_up_proj", dim=1),
    Rename(f"{EXPERTS}.down", "model.layers.{i}.mlp.experts.down_proj"),
)


def _to_hf(native: Config) -> Config:
    """Keys with one name in all brands. Raises Misfit for what their routers and experts are not."""
    moe = native["moe"]
    if moe is None:
        raise misfit("model.moe", None, ["a table of experts"])
    assert moe.keys() == {*FIXED, *FREE, *OWN}, f"a new option of experts: {moe.keys() ^ {*FIXED, *FREE, *OWN}}"
    for key, value in FIXED.items():
        if moe[key] != value:
            raise misfit(f"model.moe.{key}", moe[key], [value])
    if moe["top_groups"] != moe["groups"]:
        raise misfit("model.moe.top_groups", moe["top_groups"], [f"{moe['groups']}, as model.moe.groups"])
    balanced = moe["balance"] != "none"
    return {
        "num_experts_per_tok": moe["top_k"],
        "router_aux_loss_coef": moe["balance_weight"] if balanced else 0.0,
    }


def _to_native(hf: Config, experts: str, ffn: str, normalize: bool) -> Config:
    own = {
        "experts": hf[experts],
        "top_k": hf["num_experts_per_tok"],
        "ffn": hf[ffn],
        "normalize": normalize,
        "balance_weight": hf["router_aux_loss_coef"],
    }
    if not 1 <= own["top_k"] <= own["experts"]:
        raise misfit("num_experts_per_tok", own["top_k"], [f"1 to {experts} = {own['experts']}"])
    return FIXED | own


ROUTER_KEYS = ("num_experts_per_tok", "router_aux_loss_coef")


def every_layer(experts: str, normalize_key: str | None) -> ConfigRow:
    """Every layer is sparse, `intermediate_size` an expert's width. normalize_key: None where weights always are."""

    def write(native: Config) -> Config:
        config, moe = _to_hf(native), native["moe"]
        for key, value in (("first_dense", 0), ("every", 1)):
            if moe[key] != value:
                raise misfit(f"model.moe.{key}", moe[key], [value])
        if normalize_key is None and not moe["normalize"]:
            raise misfit("model.moe.normalize", False, [True])
        normalize = {normalize_key: moe["normalize"]} if normalize_key else {}
        return config | normalize | {experts: moe["experts"], "intermediate_size": moe["ffn"]}

    def read(hf: Config) -> Config:
        normalize = hf[normalize_key] if normalize_key else True
        moe = _to_native(hf, experts, "intermediate_size", normalize)
        return {"moe": moe | {"first_dense": 0, "every": 1}, "ffn": moe["ffn"]}

    keys = (experts, "intermediate_size", *ROUTER_KEYS, *((normalize_key,) if normalize_key else ()))
    return Mapped(("moe", "ffn"), keys, write, read)


# --- Qwen3-MoE: some layers are dense, and wider than an expert ---


def _qwen_to_hf(native: Config) -> Config:
    config, moe = _to_hf(native), native["moe"]
    sparse = _sparse(native["layers"], moe["first_dense"], moe["every"])
    stepped = set(_sparse(native["layers"], 0, moe["every"]))
    step = moe["every"] if stepped.issuperset(sparse) else 1
    dense = sorted(set(_sparse(native["layers"], 0, step)) - set(sparse))
    return config | {
        "num_local_experts": moe["experts"],
        "moe_intermediate_size": moe["ffn"],
        "norm_topk_prob": moe["normalize"],
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }


def _qwen_to_native(hf: Config) -> Config:
    layers, dense = hf["num_hidden_layers"], hf["mlp_only_layers"]
    sparse = [index for index in _sparse(layers, 0, hf["decoder_sparse_step"]) if index not in dense]
    for first_dense in range(layers):
        for every in range(1, layers - first_dense + 1):
            if sparse == _sparse(layers, first_dense, every):
                moe = _to_native(hf, "num_local_experts", "moe_intermediate_size", hf["norm_topk_prob"])
                return {"moe": moe | {"first_dense": first_dense, "every": every}}
    step = hf["decoder_sparse_step"]
    raise misfit("mlp_only_layers", dense, [f"layers that, with decoder_sparse_step = {step}, leave every n-th sparse"])


def _sparse(layers: int, first_dense: int, every: int) -> list[int]:
    return list(range(first_dense + every - 1, layers, every))


QWEN_KEYS = ("num_local_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
QWEN_EXPERTS = Mapped(("moe",), (*QWEN_KEYS, *ROUTER_KEYS), _qwen_to_hf, _qwen_to_native)


def _olmoe_heads_to_hf(native: Config) -> Config:
    config = FULL_WIDTH.to_hf(native)
    if config.pop("head_dim", native["hidden"] // native["heads"]) * native["heads"] != native["hidden"]:
        allowed = [0, native["hidden"] / native["heads"]]
        raise misfit("model.head_dim", native["head_dim"], allowed)
    return config


FULL_WIDTH = heads(even=True)
# transformers takes queries to be as wide as the model, whatever head_dim says.
OLMOE_HEADS = Mapped(HEADS, ("num_attention_heads", "num_key_value_heads"), _olmoe_heads_to_hf, FULL_WIDTH.to_native)

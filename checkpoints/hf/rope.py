"""Rotary embeddings in Hugging Face's `rope_parameters`, and in our `[model.rope]` sections."""

import math

from checkpoints.hf.brand import Config, misfit

ROPE_KEYS = {  # native key -> Hugging Face's, by scaling
    "none": {"theta": "rope_theta"},
    "linear": {"theta": "rope_theta", "factor": "factor"},
    "llama3": {
        "theta": "rope_theta",
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "theta": "rope_theta",
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def rope_to_hf(rope: Config) -> Config:
    """A native rope section -> `rope_parameters`."""
    keys = ROPE_KEYS[rope["scaling"]]
    kind = {scaling: kind for kind, scaling in ROPE_TYPES.items()}[rope["scaling"]]
    values = {theirs: rope[ours] for ours, theirs in keys.items() if rope.get(ours) is not None}
    return {"rope_type": kind, **values}


def rope_to_native(parameters: Config, key: str, max_seq_len: int) -> Config:
    """`rope_parameters` -> a native rope section; `key` is named in errors."""
    given = {name: value for name, value in parameters.items() if value is not None}
    given.pop("type", None)  # the old word for rope_type
    kind = given.pop("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise misfit(f"{key}.rope_type", kind, list(ROPE_TYPES))
    scaling = ROPE_TYPES[kind]
    for name, neutral in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.pop(name, neutral) != neutral:
            raise misfit(f"{key}.{name}", parameters[name], [neutral])
    if scaling == "yarn":
        given.setdefault("factor", max_seq_len / given["original_max_position_embeddings"])
        mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        if mscale and all_dim and "attention_factor" not in given:
            given["attention_factor"] = _mscale(given["factor"], mscale) / _mscale(given["factor"], all_dim)
    names = {theirs: ours for ours, theirs in ROPE_KEYS[scaling].items()}
    if unknown := sorted(given.keys() - names.keys()):
        raise misfit(f"{key}.{unknown[0]}", given[unknown[0]], ["not set"])
    return {"scaling": scaling, **{names[name]: value for name, value in given.items()}}


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

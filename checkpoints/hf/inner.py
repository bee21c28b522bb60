"""A config inside another: `text_config`, `vision_config`. Each is of a brand of its own."""

from collections.abc import Mapping
from typing import Any

from checkpoints.hf.brand import TOKENS, Brand, Config, Misfit, misfit


def inner_to_hf(brands: Mapping[str, Brand], native: Config) -> Config:
    """The config of the first brand that expresses this part. Raises Misfit with the reasons of all."""
    reasons = []
    for brand in brands.values():
        try:
            return {"model_type": brand.model_type, **brand.to_hf(native)}
        except Misfit as error:
            reasons.append(str(error))
    raise Misfit(f"a part of the model: {'; '.join(reasons)}")


def inner_to_native(brands: Mapping[str, Brand], config: Config, key: str) -> Config:
    """What `config[key]` says of its part. Raises Misfit, KeyError."""
    inner = config[key]
    kind = inner.get("model_type")
    if kind not in brands:
        raise misfit(f"{key}.model_type", kind, list(brands))
    from transformers import AutoConfig  # imports slowly

    try:
        return brands[kind].read(inner, AutoConfig.for_model(kind).to_dict())
    except Misfit as error:
        raise Misfit(f"{key}.{error}") from None
    except KeyError as error:
        raise KeyError(f"{key}.{error.args[0]}") from None


def find_tokens(config: Config) -> Config:
    """Special tokens that a config names, or one of those inside it; None for those it does not."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    found: dict[str, Any] = {}
    for token in TOKENS:
        found[token] = next((part[token] for part in parts if part.get(token) is not None), None)
    return found


def place_tokens(brand: Brand, tokens: Config) -> Config:
    """A config of this brand with these special tokens, and nothing else: they stand with the language model."""
    return {next(iter(brand.inner)): tokens} if brand.inner else dict(tokens)


def joined(kept: Config, values: Config) -> Config:
    """`values`, and what was kept beside them; of an inner config that is now of another brand, its tokens alone."""
    whole = {**kept, **values}
    for key, value in values.items():
        old = kept.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            kind = value.get("model_type")
            same = old.get("model_type", kind) == kind
            whole[key] = joined(old if same else {k: v for k, v in old.items() if k in TOKENS}, value)
    return whole

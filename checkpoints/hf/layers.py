"""Kinds of layers: in our `pattern`, which repeats to the model's depth, and in Hugging Face's `layer_types`."""

from checkpoints.hf.brand import Config, misfit

Kinds = list[str]  # full, sliding or nope, one a layer
HF_KINDS = {"full": "full_attention", "sliding": "sliding_attention"}


def layer_kinds(native: Config, *allowed: str) -> Kinds:
    """The kind of each layer. Raises Misfit for one that is not among `allowed`."""
    pattern = native["pattern"]
    kinds = [pattern[index % len(pattern)] for index in range(native["layers"])]
    for index, kind in enumerate(kinds):
        if kind not in allowed:
            raise misfit(f"model.pattern, at layer {index},", kind, list(allowed))
    return kinds


def shortest_pattern(kinds: Kinds) -> Kinds:
    """The shortest list that gives `kinds` when repeated."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[index % length] for index, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds


def kinds_to_hf(kinds: Kinds) -> list[str]:
    """`layer_types`."""
    return [HF_KINDS[kind] for kind in kinds]


def kinds_to_native(layer_types: list[str]) -> Kinds:
    """Raises Misfit for a kind that we lack."""
    names = {theirs: ours for ours, theirs in HF_KINDS.items()}
    for index, kind in enumerate(layer_types):
        if kind not in names:
            raise misfit(f"layer_types[{index}]", kind, list(names))
    return [names[kind] for kind in layer_types]

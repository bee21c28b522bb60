import pytest

from checkpoints.hf.brand import Misfit
from checkpoints.hf.layers import kinds_to_hf, kinds_to_native, layer_kinds, shortest_pattern


@pytest.mark.parametrize(
    ("kinds", "shortest"),
    [
        (["full"] * 5, ["full"]),
        (["sliding", "full"] * 3, ["sliding", "full"]),
        (["sliding", "sliding", "full", "sliding", "sliding"], ["sliding", "sliding", "full"]),  # ends in its middle
        (["full", "full", "sliding"], ["full", "full", "sliding"]),
        (["full"], ["full"]),
    ],
)
def test_the_shortest_pattern_gives_the_same_layers(kinds: list[str], shortest: list[str]) -> None:
    assert shortest_pattern(kinds) == shortest
    assert layer_kinds({"pattern": shortest, "layers": len(kinds)}, "full", "sliding") == kinds


def test_layer_types_both_ways() -> None:
    assert kinds_to_hf(["full", "sliding"]) == ["full_attention", "sliding_attention"]
    assert kinds_to_native(["full_attention", "sliding_attention"]) == ["full", "sliding"]


def test_a_kind_that_the_other_side_lacks_is_named_with_its_layer() -> None:
    with pytest.raises(Misfit, match=r"layer_types\[1\] = 'chunked_attention' \(allowed: 'full_attention', 'sliding"):
        kinds_to_native(["full_attention", "chunked_attention"])
    with pytest.raises(Misfit, match=r"model.pattern, at layer 1, = 'nope' \(allowed: 'full', 'sliding'\)"):
        layer_kinds({"pattern": ["full", "nope"], "layers": 4}, "full", "sliding")

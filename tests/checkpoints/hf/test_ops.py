import pytest
import torch

from checkpoints.hf.ops import Concat, Rename, Row, Shapes, bind, match

SHAPES: Shapes = {
    "embed": (7, 3),
    "layers.0.q": (4, 3),
    "layers.0.k": (2, 3),
    "layers.10.q": (4, 3),
    "layers.10.k": (2, 3),
}
TABLE: tuple[Row, ...] = (
    Rename("embed", "wte"),
    Concat(("layers.{i}.q", "layers.{i}.k"), "h.{i}.qk", transpose=True),
)


def test_bind_covers_each_layer_once_with_the_shapes_of_both_sides() -> None:
    steps = bind(TABLE, SHAPES)
    assert [step.hf for step in steps] == [("wte",), ("h.0.qk",), ("h.10.qk",)]
    assert [step.hf_shapes for step in steps] == [((7, 3),), ((3, 6),), ((3, 6),)]
    assert steps[2].native == ("layers.10.q", "layers.10.k")


def test_concat_is_undone_with_blocks_of_unequal_size() -> None:
    q, k = torch.randn(4, 3), torch.randn(2, 3)
    row = TABLE[1]
    joined = row.to_hf([q, k])
    assert torch.equal(joined[0], torch.cat((q, k)).T)
    back = row.to_native(joined, [(4, 3), (2, 3)])
    assert torch.equal(back[0], q) and torch.equal(back[1], k)


def test_templates_stand_for_digits_only() -> None:
    assert match("h.{i}.attn.bias", "h.12.attn.bias") == "12"
    assert match("h.{i}.attn.bias", "h.12.attn.c_attn.bias") is None
    assert match("h.{i}.attn.bias", "h.12xattn.bias") is None
    assert match("norm.weight", "norm.weight") == ""


@pytest.mark.parametrize(
    ("table", "shapes", "message"),
    [
        (TABLE[:1], SHAPES, "no row for 'layers.0.k', 'layers.0.q', 'layers.10.k' and 1 more"),
        ((*TABLE, Rename("embed", "other")), SHAPES, "native tensor 'embed' is in two rows"),
        ((TABLE[0], Rename("b", "wte")), {"embed": (1,), "b": (1,)}, "Hugging Face tensor 'wte' is in two rows"),
        (TABLE, {"layers.0.q": (4, 3)}, "'layers.0.q' comes with 'layers.0.k', which the model lacks"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: tuple, shapes: dict, message: str) -> None:
    with pytest.raises(ValueError, match="conversion table") as caught:
        bind(table, shapes)
    assert message in str(caught.value)

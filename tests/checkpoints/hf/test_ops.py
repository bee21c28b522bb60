import pytest
import torch

from checkpoints.hf.ops import (
    ChannelsLast,
    Concat,
    PerHead,
    Rename,
    Row,
    Shapes,
    Stack,
    View,
    bind,
    match,
    under,
    wrong_experts,
)

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


EXPERTS: tuple[Row, ...] = (Stack("layers.{i}.up", "h.{i}.experts.{e}.up"),)


def test_stack_is_one_tensor_an_expert_in_order() -> None:
    steps = bind(EXPERTS, {"layers.0.up": (2, 4, 3), "layers.10.up": (12, 5, 3)})
    assert steps[0].hf == ("h.0.experts.0.up", "h.0.experts.1.up")
    assert steps[1].hf[2] == "h.10.experts.2.up" and steps[1].hf[11] == "h.10.experts.11.up"
    assert steps[1].hf_shapes == ((5, 3),) * 12
    stacked = torch.randn(12, 5, 3)
    parts = EXPERTS[0].to_hf([stacked])
    assert len(parts) == 12 and all(torch.equal(part, stacked[index]) for index, part in enumerate(parts))
    assert torch.equal(EXPERTS[0].to_native(parts, [(12, 5, 3)])[0], stacked)


def test_concat_along_another_dim() -> None:
    gate, up = torch.randn(4, 5, 3), torch.randn(4, 2, 3)
    row = Concat(("gate", "up"), "gate_up", dim=1)
    (joined,) = row.to_hf([gate, up])
    assert joined.shape == (4, 7, 3) and torch.equal(joined[:, 5:], up)
    back = row.to_native([joined], [(4, 5, 3), (4, 2, 3)])
    assert torch.equal(back[0], gate) and torch.equal(back[1], up)


def test_view_is_the_same_values_in_another_shape() -> None:
    conv = torch.randn(5, 3, 2, 2)
    row = View("embed", "conv", lambda shape: (shape[0], 3, 2, 2))
    flat = conv.flatten(1)
    assert torch.equal(row.to_hf([flat])[0], conv)
    assert torch.equal(row.to_native([conv], [(5, 12)])[0], flat)


def test_per_head_puts_each_heads_queries_keys_and_values_together() -> None:
    row = PerHead(("q", "k", "v", "norm"), ("qkv", "q_norm"))
    for shape in ((6, 4), (6,)):  # two heads of three dims: weights, and biases
        q, k, v, norm = torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.randn(3)
        joined, along = row.to_hf([q, k, v, norm])
        assert torch.equal(joined[:6], torch.cat((q[:3], k[:3]))) and torch.equal(joined[15:], v[3:])
        back = row.to_native([joined, along], [shape, shape, shape, (3,)])
        assert all(torch.equal(one, other) for one, other in zip(back, (q, k, v, norm), strict=True))


def test_channels_last() -> None:
    """y and x swapped would go unseen by shapes."""
    weight = torch.arange(12.0)[None]  # channel * 4 + y * 2 + x
    row = ChannelsLast("embed", "vision")
    (there,) = row.to_hf([weight])
    assert there[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(row.to_native([there], [(1, 12)])[0], weight)


def test_rows_under_a_prefix_are_those_of_a_part() -> None:
    rows = under((Rename("norm", "ln", keep_dtype=True), *TABLE), native="vision.", hf="tower.model.")
    (step,) = bind(rows, {"vision.norm": (3,)})
    assert (step.native, step.hf, step.keep_dtype) == (("vision.norm",), ("tower.model.ln",), True)
    steps = bind(rows, {f"vision.{name}": shape for name, shape in SHAPES.items()})
    assert [step.hf[0] for step in steps] == ["tower.model.wte", "tower.model.h.0.qk", "tower.model.h.10.qk"]
    with pytest.raises(ValueError, match="no row for 'norm'"):
        bind(rows, {"norm": (3,)})


def test_another_number_of_experts_is_told_from_missing_ones() -> None:
    shapes: Shapes = {f"layers.{i}.up": (4, 5, 3) for i in range(2)}

    def found(*experts: set[int]) -> tuple[int, int] | None:
        names = [f"h.{i}.experts.{e}.up" for i, there in enumerate(experts) for e in there]
        return wrong_experts(EXPERTS, shapes, names)

    assert found({0, 1, 2, 3}, {0, 1, 2, 3}) is None
    assert found({0, 1}, {0, 1}) == (2, 4)
    assert found(set(range(12)), set(range(12))) == (12, 4)
    assert found({0, 1, 2, 3}, {0, 1}) is None  # layers differ
    assert found({0, 1, 3}, {0, 1, 3}) is None  # a hole
    assert found() is None


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

"""The comparison must find what is wrong, call it by its name, and not cry over rounding."""

import math

import pytest
import torch

from parallel.layouts import all_layouts, axes_alone, describe_layout, features, suspects
from parallel.mesh import AXES, ParallelConfig
from parallel.verify import MARGIN, Comparison, Distance, Layout, compare, describe_factor, typical_error

NAMES = ("embed.weight", "layers.0.q.weight", "layers.0.k.weight", "layers.1.q.weight", "layers.1.k.weight")
DEGREES = {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 4, "tp": 1}


def reference() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(8, 4, generator=generator, dtype=torch.float64) for name in NAMES}


def rounded(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t * (1 + 1e-7 * torch.randn(t.shape, generator=generator)) for n, t in tensors.items()}


def distances(tensors: dict[str, torch.Tensor]) -> dict[str, Distance]:
    return {name: Distance.of(tensor, reference()[name]) for name, tensor in tensors.items()}


def comparison(
    gradients: list[dict[str, torch.Tensor]], loss: float = 2.0, *, degrees=DEGREES, tied=(), accumulation=1, **others
) -> Comparison:
    """Of a layout with these gradients on its ranks; all else agrees unless it is given."""
    rounding = distances(rounded(reference()))
    typical = typical_error(rounding)
    number = {"loss of step 1": Distance.of(2.0 + 1e-7, 2.0)}
    rows = {
        "initial weights": compare([distances(reference())], distances(reference()), 0.0),
        "losses": compare([{"loss of step 1": Distance.of(loss, 2.0)}], number, typical),
        "gradients": compare([distances(g) for g in gradients], rounding, typical),
        "norms": compare([{"norm": Distance.of(2.0, 2.0)}], {"norm": Distance.of(2.0 + 1e-7, 2.0)}, typical),
        "weights": compare([distances(rounded(reference(), 3))], rounding, typical),
    }
    return Comparison(Layout(degrees, accumulation, tied), rows | others)


def scaled(factor: float, *names: str) -> dict[str, torch.Tensor]:
    return {n: t * factor if n in names or not names else t for n, t in rounded(reference(), 2).items()}


def test_rounding_agrees_and_a_small_error_does_not():
    assert comparison([rounded(reference(), 2)]).agrees
    assert comparison([rounded(reference(), 2)]).diagnosis() == []
    small = rounded(reference(), 2)
    small["layers.1.q.weight"][3, 2] += 1e-4
    found = comparison([small])
    assert not found.agrees
    assert found.diagnosis()[0].startswith("layers.1.q.weight: its gradient is off by")
    assert "the first of 1 gradients that are off, of 5" in found.diagnosis()[0]
    assert "The losses agree" in found.diagnosis()[1]


def test_what_is_allowed_follows_each_tensors_own_conditioning():
    ill = rounded(reference())
    ill["layers.0.k.weight"] = reference()["layers.0.k.weight"] + 1e-3
    rounding = distances(ill)
    rows = {row.name: row for row in compare([rounding], rounding, typical_error(rounding))}
    assert rows["layers.0.k.weight"].allowed > 1e3 * rows["layers.0.q.weight"].allowed
    assert typical_error(rounding) < 2e-7  # the median: one bad tensor does not spoil it
    assert rows["layers.0.q.weight"].allowed < 3 * MARGIN * 1e-7 * rows["layers.0.q.weight"].distance.norm


@pytest.mark.parametrize(
    ("factor", "loss", "said"),
    [
        (2.0, 2.0, "2.0 times: exactly parallel.dp_shard: gradients summed once too often"),
        (0.5, 2.0, "0.5 times: exactly 1 / parallel.dp_shard: gradients averaged over it where they must be summed"),
        (4.0, 8.0, "4.0 times: exactly parallel.cp"),
        (8.0, 2.0, "8.0 times: exactly data and context degrees together"),
        (1.5, 2.0, "1.5 times: no degree of this layout"),
    ],
)
def test_a_factor_on_all_gradients_is_said_with_its_cause(factor, loss, said):
    lines = comparison([scaled(factor)], loss).diagnosis()
    assert any(line.startswith(f"Every gradient is {said}") for line in lines), lines
    assert lines[0].startswith(f"embed.weight: its gradient is {factor} times what it should be")
    assert any("the loss summed once too often" in line for line in lines) == (loss == 8.0)


def test_two_and_a_half_are_said_without_such_a_degree():
    alone = dict.fromkeys(AXES, 1)
    assert any("exactly 2: gradients summed twice" in x for x in comparison([scaled(2)], degrees=alone).diagnosis())
    assert any("exactly one half" in x for x in comparison([scaled(0.5)], degrees=alone).diagnosis())
    lines = comparison([scaled(3)], degrees=alone, accumulation=3).diagnosis()
    assert any("exactly the number of micro-batches" in line for line in lines)


def test_one_parameter_that_is_doubled_is_named():
    lines = comparison([scaled(2.0, "layers.0.k.weight", "layers.1.k.weight")]).diagnosis()
    assert lines[0].startswith("layers.0.k.weight: its gradient is 2.0 times")
    assert lines[1].startswith("layers.0.k.weight, layers.1.k.weight: 2.0 times: exactly parallel.dp_shard")


def test_a_layer_without_gradients_is_named():
    zero = {n: t * (not n.startswith("layers.1")) for n, t in rounded(reference(), 2).items()}
    lines = comparison([zero], loss=2.01).diagnosis()
    assert any(
        line.startswith("No gradient at all: layers.1.q.weight, layers.1.k.weight: does not run") for line in lines
    )
    assert any("the forward pass computes another function; under cp: positions" in line for line in lines)


def test_a_layer_that_no_process_has_is_named():
    first = {n: t for n, t in reference().items() if not n.startswith("layers")}
    second = {n: t for n, t in reference().items() if n.startswith("layers.0")}
    rows = compare([distances(first), distances(second)], distances(reference()), 0.0)
    lines = comparison([first, second], **{"initial weights": rows}).diagnosis()
    assert lines[0].startswith("layers.1.q.weight, layers.1.k.weight: on no process")
    assert len(lines) == 1
    lost = comparison([first, second]).rows["gradients"]
    assert [row.name for row in lost if row.off] == [row.name for row in lost if not row.held]


def test_a_tied_weight_that_lacks_a_use_is_named():
    half = rounded(reference(), 2)
    half["embed.weight"] = half["embed.weight"] * torch.rand(8, 1)
    lines = comparison([half], tied=("embed.weight",)).diagnosis()
    assert any(line.startswith("embed.weight is used twice") for line in lines)


def test_a_rank_that_is_off_alone_is_named_and_nan_is_off():
    good, bad = rounded(reference(), 2), scaled(2.0, "layers.0.q.weight")
    assert "layers.0.q.weight: its gradient on rank 2 only is 2.0 times" in comparison([good, good, bad]).diagnosis()[0]
    broken = rounded(reference(), 2)
    broken["layers.0.q.weight"][0, 0] = math.nan
    assert not comparison([good, broken]).agrees
    assert comparison([good, broken]).diagnosis()[0].startswith("layers.0.q.weight: its gradient on rank 1 only")


def test_other_initial_weights_are_the_first_thing_said():
    start = reference()
    start["layers.0.q.weight"] += 1e-9  # not even rounding is allowed
    rows = compare([distances(reference()), distances(start)], distances(reference()), 0.0)
    lines = comparison([scaled(2.0)], **{"initial weights": rows}).diagnosis()
    assert lines == [line for line in lines if "layers.0.q.weight is the first of 1 parameters" in line]
    assert "on rank 1 only" in lines[0]
    assert "another seed" in lines[0]


def test_norm_and_optimizer_are_named_when_all_before_agrees():
    norm = compare([{"norm": Distance.of(2.8, 2.0)}], {"norm": Distance.of(2.0 + 1e-7, 2.0)}, 1e-7)
    lines = comparison([reference()], norms=norm).diagnosis()
    assert lines[0].startswith("norm is 1.4 times what it should be while every gradient agrees")
    rounding = distances(rounded(reference()))
    weights = compare([distances(scaled(1.1, "layers.1.k.weight"))], rounding, 1e-7)
    lines = comparison([reference()], weights=weights).diagnosis()
    assert lines[0].startswith(
        "layers.1.k.weight: weights are off by 1.0e-01 of the update (the first of 1), factor 1.1"
    )


def test_a_loss_that_is_only_reported_wrong():
    lines = comparison([reference()], loss=8.0).diagnosis()
    assert "while the gradients agree: what is reported is not what is differentiated" in lines[0]
    assert "exactly parallel.cp" in lines[0]


def test_factors_are_short_where_they_are():
    assert [describe_factor(f) for f in (2.00001, 0.5, 1.00213, -1.0)] == ["2.0", "0.5", "1.0021", "-1.0"]


def test_all_layouts_of_a_number_of_processes():
    layouts = all_layouts(ParallelConfig(), 4, ("gpipe", "1f1b"))
    degrees = [tuple(getattr(layout, axis) for axis in AXES) for layout in layouts]
    assert all(math.prod(d) == 4 for d in degrees)
    assert len(set(degrees)) == 15  # ways to write 2 x 2 over five axes
    assert len({(d, x.schedule, x.cp_method) for d, x in zip(degrees, layouts, strict=True)}) == len(layouts)
    assert len(layouts) == 15 + 5 + 6  # a second cp method where cp > 1, a second schedule where pp > 1, both once
    assert {x.cp_method for x in layouts if x.cp > 1} == {"ulysses", "ring"}
    assert all_layouts(ParallelConfig(), 1, ("1f1b",)) == [ParallelConfig(dp_shard=1)]


def test_what_failed_layouts_have_in_common():
    layout = ParallelConfig(pp=2, dp_shard=1, cp=2, cp_method="ring")
    assert describe_layout(layout) == "pp 2 (1f1b) x cp 2 (ring)"
    assert [describe_layout(part) for part in axes_alone(layout)] == ["pp 2 (1f1b)", "cp 2 (ring)"]
    assert axes_alone(ParallelConfig(dp_shard=1, tp=2)) == []
    failed = [features(layout), features(ParallelConfig(dp_shard=2, cp=2, cp_method="ring"))]
    passed = [features(ParallelConfig(dp_shard=2, cp=2)), features(ParallelConfig(dp_shard=4))]
    assert suspects(failed, passed) == (["parallel.cp_method = ring"], ["parallel.cp > 1"])
    assert suspects([], passed) == ([], [])

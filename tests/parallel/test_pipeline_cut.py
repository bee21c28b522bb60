"""Where the layers are cut, who has which stage, and which settings are refused."""

from itertools import combinations, pairwise

import pytest
import torch

from parallel.mesh import ParallelConfig
from parallel.pipeline_cut import (
    check_microbatches,
    cut,
    cut_by_hand,
    cut_layers,
    num_stages,
    owner_of,
    plan_stages,
    schedule_class,
    schedule_names,
    stages_of,
)
from pretrain.config import resolve
from pretrain.models import FAMILIES
from tests.parallel.pipeline_model import SmallModel, plan


def every_cut(layers: int, stages: int) -> list[list[range]]:
    inner = combinations(range(1, layers), stages - 1)
    return [[range(a, b) for a, b in pairwise((0, *cuts, layers))] for cuts in inner]


def slowest(cuts: list[range], costs: list[float], head: float, embed: float) -> float:
    times = [sum(costs[i] for i in layers) for layers in cuts]
    times[0] += embed
    times[-1] += head
    return max(times)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("head", "embed"), [(0, 0), (2.5, 0), (0, 4), (7, 1)])
def test_no_cut_has_a_faster_slowest_stage(stages, head, embed):
    costs = [1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 5.0, 1.0, 1.0]
    found = cut_layers(costs, stages, head_cost=head, embed_cost=embed)
    assert [i for layers in found for i in layers] == list(range(9))
    assert len(found) == stages and all(len(layers) for layers in found)
    best = min(slowest(cuts, costs, head, embed) for cuts in every_cut(9, stages))
    assert slowest(found, costs, head, embed) == best


def test_equal_layers_are_dealt_out_evenly():
    assert sorted(map(len, cut_layers([1.0] * 10, 4))) == [2, 2, 3, 3]
    assert [len(layers) for layers in cut_layers([1.0] * 16, 4)] == [4, 4, 4, 4]


def test_a_vocabulary_as_dear_as_layers_shortens_the_last_stage():
    config = resolve("llama3-8b", ["parallel.pp=8"])[0]
    family = FAMILIES[config.model.family]
    with torch.device("meta"):
        model = family.build(config.model)
    stages = plan_stages(model, family.plan(config.model), config.parallel, 8, config.data.seq_len)
    # The head has 128256 x 4096 elements, a layer 218 M: 2.4 layers. The embedding is only looked up.
    assert len(stages[-1]) == 2 and len(stages[0]) > 3
    assert sum(map(len, stages)) == 32


@pytest.mark.parametrize("schedule", schedule_names())
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_stage_has_one_owner(schedule, pp):
    stages = num_stages(ParallelConfig(schedule=schedule), pp, 24)
    held = [stages_of(schedule, rank, pp, stages) for rank in range(pp)]
    assert sorted(index for indices in held for index in indices) == list(range(stages))
    for stage in range(stages):
        assert stage in held[owner_of(schedule, stage, pp)]


def test_v_shaped_schedules_have_the_last_stage_beside_the_first():
    assert stages_of("ZBVZeroBubble", 0, 4, 8) == [0, 7]
    assert stages_of("dualpipev", 3, 4, 8) == [3, 4]
    assert stages_of("interleaved1f1b", 1, 4, 8) == [1, 5]


def test_schedules_go_by_any_case_and_unknown_ones_are_listed():
    assert schedule_class("ZBVZeroBubble") is schedule_class("zbvzerobubble")
    with pytest.raises(ValueError, match=r"parallel.schedule = 'zigzag' is unknown: one of 1f1b, dualpipev, gpipe"):
        schedule_class("zigzag")
    with pytest.raises(ValueError, match="is unknown"):
        schedule_class("PipelineScheduleSingle")  # torch's base class, which its own table has


@pytest.mark.parametrize(
    ("options", "pp", "layers", "expected"),
    [
        ({}, 4, 9, 4),
        ({"schedule": "gpipe"}, 4, 4, 4),
        ({"schedule": "interleaved1f1b"}, 4, 9, 8),
        ({"schedule": "interleaved1f1b"}, 4, 7, 4),  # too few layers for two stages each
        ({"schedule": "loopedbfs", "stages_per_rank": 3}, 2, 9, 6),
        ({"schedule": "interleaved1f1b", "stage_layers": (1,) * 6}, 2, 6, 6),
        ({"schedule": "dualpipev"}, 3, 6, 6),
    ],
)
def test_number_of_stages(options, pp, layers, expected):
    assert num_stages(ParallelConfig(**options), pp, layers) == expected


@pytest.mark.parametrize(
    ("options", "pp", "layers", "message"),
    [
        ({}, 8, 6, r"parallel.pp = 8 with 1 stage a process .* the model has 6; set parallel.pp to 6 or less"),
        ({"schedule": "zbvzerobubble"}, 4, 7, r"needs at least 8 layers, but the model has 7; set parallel.pp to 3"),
        ({"schedule": "gpipe", "stages_per_rank": 2}, 2, 8, r"'gpipe' has 1 a process; set it to 1 or leave it out"),
        ({"schedule": "dualpipev", "stages_per_rank": 3}, 2, 8, r"has 2 a process"),
    ],
)
def test_refused_numbers_of_stages(options, pp, layers, message):
    with pytest.raises(ValueError, match=message):
        num_stages(ParallelConfig(**options), pp, layers)


def test_stages_by_hand():
    assert cut_by_hand((1, 3, 2), 6, 3) == [range(0, 1), range(1, 4), range(4, 6)]
    with pytest.raises(
        ValueError, match=r"stage_layers = \[2, 2\] has 2 entries, but needs 3: the number of layers of"
    ):
        cut_by_hand((2, 2), 6, 3)
    with pytest.raises(
        ValueError, match=r"stage_layers = \[1, 3, 3\] sums to 7; it must share out the model's 6 layers"
    ):
        cut_by_hand((1, 3, 3), 6, 3)
    with pytest.raises(ValueError, match="at least 1 a stage"):
        cut_by_hand((3, 0, 3), 6, 3)
    assert cut_by_hand((0, 6, 0), 6, 3)[1] == range(6)  # the ends have embedding and head


@pytest.mark.parametrize(
    ("schedule", "pp", "global_batch", "micro_batch", "data", "message"),
    [
        (
            "1f1b", 4, 4, 2, 1,
            r"train.global_batch = 4 with train.micro_batch = 2 is 2 micro-batches .* parallel.pp = 4 \(4 stages\) "
            r"needs 4 or 5; set train.global_batch = 8 or 10, or train.micro_batch = 1, or lower parallel.pp",
        ),
        ("dualpipev", 2, 12, 2, 2, r"needs 4 or 5; set train.global_batch = 16 or 20"),
        ("interleaved1f1b", 2, 7, 1, 1, r"is 7 micro-batches .* needs 6 or 8; set train.global_batch = 6 or 8"),
    ],
)  # fmt: skip
def test_refused_micro_batches_name_the_nearest_legal_ones(schedule, pp, global_batch, micro_batch, data, message):
    options = ParallelConfig(schedule=schedule)
    with pytest.raises(ValueError, match=message):
        check_microbatches(options, pp, num_stages(options, pp, 24), global_batch, micro_batch, data)


@pytest.mark.parametrize("schedule", schedule_names())
def test_micro_batches_that_fill_the_pipeline_are_fine(schedule):
    options = ParallelConfig(schedule=schedule)
    check_microbatches(options, 2, num_stages(options, 2, 4), global_batch=16, micro_batch=2, data=1)


def test_a_stage_keeps_names_and_only_its_own_modules():
    whole = SmallModel(5, tied=True)
    stages = []
    for index, layers in enumerate([range(0, 1), range(1, 4), range(4, 5)]):
        model = SmallModel(5, tied=True)
        cut(model, plan(tied=True), layers, first=index == 0, last=index == 2)
        stages.append(model)
    assert [list(stage.layers) for stage in stages] == [["0"], ["1", "2", "3"], ["4"]]
    assert stages[0].embed is not None and stages[0].head is None and stages[0].norm is None
    assert stages[1].embed is None and stages[1].head is None
    assert stages[2].embed is None and stages[2].norm is not None
    assert isinstance(stages[2].head.weight, torch.nn.Parameter)  # tied to an embedding that is elsewhere
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert set(names) == {name for name, _ in whole.named_parameters()} | {"head.weight"}

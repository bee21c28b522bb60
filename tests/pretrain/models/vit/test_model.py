"""Vision transformers: parameters counted, padding without a say, mistakes named, layouts that equal one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.gradients import local
from parallel.plan import styles_of
from parallel.world import World
from pretrain.config import RunConfig, validate
from pretrain.engine import build_engine
from pretrain.load import build_model
from pretrain.models import FAMILIES
from pretrain.objectives import OBJECTIVES
from pretrain.verify import synthetic_stream, whole
from tests.ranks import run_ranks

VISION = {"hidden": 32, "layers": 2, "heads": 4, "ffn": 40, "grid": [4, 4]}
MODELS = {
    "class": {"vision": {**VISION, "class_token": True}},
    "mean": {"pool": "mean", "vision": {**VISION, "positions": "rope", "patch_bias": False, "first_norm": True}},
}
PATCHES, BATCH, ABSENT = 20, 8, 7  # the row of the synthetic stream that has no picture


def recipe(name: str, **parallel: int) -> RunConfig:
    tree = {
        "model": {"family": "vit", "classes": list("abcde"), "patches": {"size": 2}, **MODELS[name]},
        "objective": {"name": "classification"},
        "data": {"seq_len": PATCHES, "patches": PATCHES},
        "train": {"precision": "fp64", "global_batch": BATCH, "micro_batch": 2},
        "parallel": parallel,
    }
    return validate(tree, name)


def rows(config: RunConfig) -> dict[str, Tensor]:
    """Pictures of several shapes, padding after them."""
    return {name: torch.from_numpy(array) for name, array in synthetic_stream(config).read(0, BATCH)._asdict().items()}


def step(name: str, **parallel: int) -> dict[str, Tensor]:
    """Sums, whole gradients and whole weights after one optimizer step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = recipe(name, **parallel)
    objective = OBJECTIVES["classification"][1](config.objective)
    engine = build_engine(config, World(rank, size, torch.device("cpu")), objective)
    own = torch.arange(BATCH).chunk(engine.data_world)[engine.data_rank].split(2)
    batches = [objective.collate({key: value[some] for key, value in rows(config).items()}) for some in own]
    count = engine.sum_over_data(torch.tensor(objective.count(batches)))
    assert count == BATCH - 1
    sums = engine.forward_backward(batches, count)
    found = {f"grad {key}": tensor for key, tensor in whole(engine.gradients()).items()}
    engine.step(0.01)
    weights = {f"weight {key}": tensor for key, tensor in whole(engine.state_dict()["model"]).items()}
    return {**{key: local(value) for key, value in sums.items()}, **found, **weights}


def steps(cases: list[tuple[str, dict[str, int]]]) -> list[dict[str, Tensor] | str]:
    found: list[dict[str, Tensor] | str] = []
    for name, layout in cases:
        try:
            found.append(step(name, **layout))
        except ValueError as error:
            found.append(str(error))
    return found


def test_layouts_equal_one_process() -> None:
    cases = [("class", {"tp": 2}), ("class", {"cp": 2}), ("mean", {"tp": 2}), ("mean", {"dp_shard": 2})]
    cases += [("class", {"pp": 2, "dp_shard": 1}), ("mean", {"cp": 2})]
    alone = {name: step(name) for name in MODELS}
    for rank in run_ranks(steps, 2, cases, timeout=120):
        assert 'parallel.cp = 2: model.pool = "mean" needs whole rows' in rank.pop()
        for (name, layout), one in zip(cases, rank, strict=False):
            expected = alone[name]
            assert one.keys() == expected.keys() or ("pp" in layout and one.keys() < expected.keys())
            for key, value in one.items():
                torch.testing.assert_close(
                    value, expected[key], rtol=1e-9, atol=1e-10, msg=f"{name} {layout}: {key}", check_dtype=False
                )


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_and_planned(name: str) -> None:
    config = recipe(name).model
    with torch.device("meta"):
        model = FAMILIES["vit"].build(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    styles_of(model, FAMILIES["vit"].plan(config))


@pytest.mark.parametrize("name", MODELS)
def test_only_what_belongs_to_a_picture_has_a_say(name: str) -> None:
    config = recipe(name)
    objective = OBJECTIVES["classification"][1](config.objective)
    model = build_model(config.model)
    for key, parameter in model.named_parameters():
        model.init_parameter(key, parameter.data, torch.Generator().manual_seed(len(key)))
    batch = rows(config)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ready = objective.collate(batch)
        value: Tensor = objective.loss(model, objective.forward(model, ready), ready)["loss"]
        return value

    expected = loss(batch)
    noisy = {key: value.clone() for key, value in batch.items()}
    noisy["patches"][batch["images"] < 0] = 77
    torch.testing.assert_close(loss(noisy), expected)
    seen = {key: value.clone() for key, value in batch.items()}
    seen["patches"][2, 1] += 40
    assert batch["images"][2, 1] == 0 and not torch.isclose(loss(seen), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pool=mean", r'model\.pool = "mean" with model\.vision\.class_token = True'),
        ("model.vision.output_layer=-2", r"model\.vision\.output_layer = -2: a classifier takes the last"),
        ("data.seq_len=16", r"data\.seq_len = 16, but a picture has 17 patches .*class token"),
        ("data.patches=0", r"data\.patches = 0: a classifier needs the patches of one picture a row"),
        ("parallel.tp=3", r"parallel\.tp = 3 does not divide the 20 patches of a row; raise .* to 21"),
        ("model.classes=[]", r"model\.classes = \[\]"),
    ],
)
def test_mistakes_are_named_in_one_line(change: str, message: str) -> None:
    key, _, value = change.partition("=")
    tree = recipe("class").model_dump(mode="json", exclude_none=True)
    *sections, last = key.split(".")
    part = tree
    for section in sections:
        part = part[section]
    part[last] = {"mean": "mean", "[]": []}.get(value, value)
    with pytest.raises(ValueError, match=message) as caught:
        validate(tree, "recipe")
    assert "\n" not in str(caught.value)

"""Dual encoders: parameters counted, padding and broken rows without a say, layouts that equal one process, in fp64."""

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
from pretrain.verify import whole
from tests.ranks import run_ranks

VISION = {"hidden": 32, "layers": 2, "heads": 4, "ffn": 40, "grid": [4, 4]}
TEXT = {"hidden": 24, "layers": 3, "heads": 4, "ffn": 36, "activation": "quick_gelu", "gated": False}
CLIP = {
    "vision": {**VISION, "class_token": True, "patch_bias": False, "first_norm": True, "activation": "quick_gelu"},
    **TEXT,
    "image_pool": "class",
}
SIGLIP = {
    "vision": VISION,
    **TEXT,
    "image_pool": "map",
    "text_pool": "last",
    "features": 32,
    "image_head": False,
    "text_bias": True,
    "logit_scale": 10.0,
    "max_logit_scale": 0.0,
    "logit_bias": -10.0,
}
MEAN = {"vision": VISION, "hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 36}
MODELS = {"clip": CLIP, "siglip": SIGLIP, "mean": MEAN}
LENGTH, PATCHES, BATCH = 16, 20, 8


def recipe(name: str, **parallel: int) -> RunConfig:
    model = {"family": "dual", "vocab_size": 67, "max_seq_len": LENGTH, "patches": {"size": 2}, **MODELS[name]}
    tree = {
        "model": {"features": 20, **model},
        "objective": {"name": "contrastive", "loss": "sigmoid" if name == "siglip" else "softmax", "chunk_rows": 3},
        "data": {"seq_len": LENGTH, "patches": PATCHES},
        "train": {"precision": "fp64", "global_batch": BATCH, "micro_batch": BATCH},
        "optim": {"lr": 0.01},
        "parallel": parallel,
    }
    return validate(tree, name)


def pairs(class_slot: bool) -> dict[str, Tensor]:
    """Pictures of several shapes with padding after them, texts of several lengths; row 3 has no picture."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 16, 9, 7, 1, 12, 5, 10])
    images, grid = torch.full((BATCH, PATCHES), -1), torch.zeros(BATCH, PATCHES, 2, dtype=torch.int64)
    for row, (tall, wide) in enumerate([(4, 4), (2, 3), (4, 1), (0, 0), (3, 3), (1, 1), (4, 4), (2, 2)]):
        cells = [(-1, -1)] * (class_slot and tall > 0) + [(y, x) for y in range(tall) for x in range(wide)]
        images[row, : len(cells)] = 0
        grid[row, : len(cells)] = torch.tensor(cells).reshape(-1, 2)
    return {
        "tokens": torch.randint(0, 67, (BATCH, LENGTH), generator=generator),
        "documents": torch.where(torch.arange(LENGTH) < lengths[:, None], 0, -1),
        "patches": torch.randint(0, 256, (BATCH, PATCHES, 12), generator=generator, dtype=torch.uint8),
        "images": images,
        "grid": grid,
    }


def step(name: str, **parallel: int) -> dict[str, Tensor]:
    """Loss, norm, whole gradients and whole weights after one optimizer step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = recipe(name, **parallel)
    data = size // parallel.get("tp", 1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": BATCH // data})})
    objective = OBJECTIVES["contrastive"][1](config.objective)
    engine = build_engine(config, World(rank, size, torch.device("cpu")), objective)
    own = torch.arange(BATCH).chunk(engine.data_world)[engine.data_rank]
    batch = {key: value[own] for key, value in pairs(config.model.vision.class_token).items()}
    batches = [objective.collate(batch)]
    count = engine.sum_over_data(torch.tensor(objective.count(batches)))
    assert count == BATCH - 1
    sums = engine.forward_backward(batches, count)
    found = {f"grad {key}": tensor for key, tensor in whole(engine.gradients()).items()}
    found["norm"] = engine.clip_grad_norm()
    engine.step(0.01)
    weights = {f"weight {key}": tensor for key, tensor in whole(engine.state_dict()["model"]).items()}
    return {**{key: local(value) for key, value in sums.items()}, **found, **weights}


def steps(names: list[str], layouts: list[dict[str, int]]) -> list[dict[str, Tensor]]:
    return [step(name, **layout) for name in names for layout in layouts]


@pytest.mark.parametrize(
    ("world", "names", "layouts"),
    [(2, ["clip", "siglip"], [{"tp": 2}]), (4, ["mean"], [{"dp_replicate": 2}, {"tp": 2}])],
)
def test_layouts_equal_one_process(world, names, layouts):
    found = run_ranks(steps, world, names, layouts, timeout=120)
    for number, name in enumerate(names):
        alone = step(name)
        assert any(key.startswith("grad pool") for key in alone) == (name == "siglip")
        for layout in range(len(layouts)):
            for rank in found:
                one = rank[number * len(layouts) + layout]
                assert one.keys() == alone.keys()
                for key, expected in alone.items():
                    close = torch.allclose(one[key], expected, rtol=1e-9, atol=1e-10)
                    assert close, f"{name} {layouts[layout]}: {key}"


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_and_planned(name):
    config = recipe(name).model
    with torch.device("meta"):
        model = FAMILIES["dual"].build(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    styles_of(model, FAMILIES["dual"].plan(config))


@pytest.mark.parametrize("name", MODELS)
def test_only_what_belongs_to_a_pair_has_a_say(name):
    """Padding of rows of patches, padding of texts but for SigLIP's, and rows that are no pair change no loss."""
    config = recipe(name)
    objective = OBJECTIVES["contrastive"][1](config.objective)
    model = build_model(config.model)
    for key, parameter in model.named_parameters():
        model.init_parameter(key, parameter.data, torch.Generator().manual_seed(len(key)))

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ready = objective.collate(batch)
        return objective.loss(model, objective.forward(model, ready), ready)["loss"]

    batch = pairs(config.model.vision.class_token)
    expected = loss(batch)
    noisy = {key: value.clone() for key, value in batch.items()}
    noisy["patches"][batch["images"] < 0] = 77
    noisy["tokens"][3] = 5
    if name != "siglip":
        noisy["tokens"][batch["documents"] < 0] = 66
    torch.testing.assert_close(loss(noisy), expected)
    seen = {key: value.clone() for key, value in batch.items()}
    seen["tokens"][1, -1] += 1
    assert not torch.isclose(loss(seen), expected, rtol=1e-7)


def test_the_scale_stays_below_its_limit():
    config = recipe("clip").model.model_copy(update={"max_logit_scale": 15.0})
    config = recipe("clip").model_copy(update={"model": config})
    objective = OBJECTIVES["contrastive"][1](config.objective)
    engine = build_engine(config, World(0, 1, torch.device("cpu")), objective)
    batches = [objective.collate(pairs(True))]
    count = torch.tensor(objective.count(batches))
    scale = engine.state_dict()["model"]["log_scale.weight"]
    for _ in range(2):
        engine.forward_backward(batches, count)
        engine.gradients()["log_scale.weight"].fill_(-1.0)
        engine.step(0.1)
    assert scale.exp().item() == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_pool": "mean"}, 'model.image_pool = "mean" with model.vision.class_token = True'),
        ({"image_head": False}, "model.features = 20 is not model.vision.hidden = 32"),
        ({"logit_scale": 200.0}, "model.logit_scale = 200.0 is above"),
        ({"moe": {"experts": 4, "top_k": 2, "ffn": 8}, "gated": True}, "model.moe"),
    ],
)
def test_mistakes_are_named_in_one_line(change, message):
    tree = {"family": "dual", "vocab_size": 67, "features": 20, **CLIP, **change}
    with pytest.raises(ValueError, match=message) as caught:
        validate({"model": tree, "objective": {"name": "contrastive"}, "data": {"patches": 17, "seq_len": 8}}, "recipe")
    assert "\n" not in str(caught.value)

"""The vision-language model: packed pictures, where features go, what is frozen; and that no rank waits for another."""

import pytest
import torch
import torch.distributed as dist

from data_pipeline.loader import to_torch
from parallel.engine import Engine
from parallel.materialise import init_parameters
from parallel.world import World
from pretrain.config import resolve
from pretrain.engine import build_engine
from pretrain.models.layers.attention import AttentionMask
from pretrain.models.vlm.model import VLM, Pictures
from pretrain.models.vlm.tower import PatchConfig, VisionConfig, VisionTower
from pretrain.objectives import OBJECTIVES
from pretrain.synthetic import SyntheticPictures
from pretrain.train import train_step
from pretrain.verify import synthetic_stream
from tests.ranks import run_ranks

S, P = 24, 32
SMALL = [
    *("model.vocab_size=40", "model.hidden=24", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.ffn=32"),
    *("model.vision.hidden=16", "model.vision.heads=2", "model.vision.ffn=20", "model.vision.layers=2"),
    *("model.vision.grid=[4, 4]", "model.patches.size=2", f"data.seq_len={S}", f"data.patches={P}"),
    *("train.global_batch=4", "train.micro_batch=2", "train.precision=fp64", "model.init_std=0.2"),
]
KINDS = {
    "mlp": [],
    "merged": ["model.connector.merge=2", 'model.vision.positions="rope"', "model.vision.heads=4"],
    "class": ["model.vision.class_token=true", "model.vision.first_norm=true", 'model.connector.kind="linear"'],
    "resampler": ['model.connector.kind="resampler"', "model.connector.queries=3", "model.connector.heads=2"],
}


def config_of(*words: str):
    return resolve("tiny-vlm", [*SMALL, *words])[0]


def make(*words: str) -> tuple[VLM, dict, SyntheticPictures]:
    """A lively model, a collated batch of 6 rows, and where it comes from."""
    config = config_of(*words)
    model = VLM(config.model).double()
    with torch.no_grad():
        init_parameters(model, 3, {})
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor) * 0.1)
    stream = synthetic_stream(config)
    assert isinstance(stream, SyntheticPictures)
    return model, OBJECTIVES["causal"][1](config.objective).collate(to_torch(stream.read(0, 6))), stream


def hidden(model: VLM, batch: dict) -> torch.Tensor:
    return model(batch["tokens"], batch["mask"], batch["positions"], pictures=batch["pictures"], slots=batch["slots"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_picture_changes_what_comes_from_its_first_token_on_and_in_its_document_only(kind):
    model, batch, _ = make(*KINDS[kind])
    before = hidden(model, batch)
    pictures, slots, documents = batch["pictures"], batch["slots"], batch["mask"].documents
    for row in (2, 5):
        number = int(pictures.images[row].max())
        place = (pictures.images[row] == number).nonzero()[-1]
        pictures.patches[row, place] = 255 - pictures.patches[row, place]
        first = int((slots[row] >= int((pictures.images[row] == number).nonzero()[0])).nonzero()[0])
        after = hidden(model, batch)
        changed = (after != before).any(-1)
        assert changed[row].any() and not changed[[r for r in range(6) if r != row]].any()
        assert not changed[row, :first].any() and not changed[row, documents[row] != documents[row, first]].any()
        # All that the picture's document has from its last token on has seen it.
        last = int((batch["slots"][row] >= 0).nonzero()[-1])
        assert changed[row, last] and changed[row, (documents[row] == documents[row, last]).nonzero()[-1]]
        before = after


@torch.no_grad()
def test_without_pictures_it_is_the_decoder():
    model, batch, _ = make()
    rows = [1, 4]
    assert bool((batch["slots"][rows] < 0).all())
    mask = AttentionMask.packed(batch["mask"].documents[rows])
    alone = model(batch["tokens"][rows], mask, batch["positions"][rows])
    torch.testing.assert_close(hidden(model, batch)[rows], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": True, "first_norm": True, "output_layer": -2}, {"positions": "rope", "norm": "rms"}],
    ids=str,
)
@torch.no_grad()
def test_packed_pictures_are_seen_as_each_alone(options):
    cfg, patches = VisionConfig(hidden=16, layers=3, heads=2, ffn=24, grid=(3, 5), **options), PatchConfig(size=2)
    tower = VisionTower(cfg, patches).double()
    for tensor in tower.parameters():
        torch.nn.init.normal_(tensor, 0.0, 0.3)
    assert sum(p.numel() for p in tower.parameters()) == cfg.num_parameters(patches.values)
    shapes, grids, values = [(3, 5), (2, 2), (1, 4)], [], []
    for rows, columns in shapes:
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).int()
        cells = torch.cat([torch.full((1, 2), -1, dtype=torch.int32), cells]) if cfg.class_token else cells
        grids.append(cells)
        values.append(torch.randint(0, 256, (len(cells), 12), dtype=torch.uint8))
    images = torch.cat([torch.full((len(grid),), n) for n, grid in enumerate(grids)])
    together = Pictures.packed(torch.cat(values)[None], images[None], torch.cat(grids)[None])
    found = tower(together.patches, together.grid, together.mask)[0].split([len(grid) for grid in grids])
    for own, grid, value in zip(found, grids, values, strict=True):
        alone = tower(value[None], grid[None], AttentionMask(causal=False))[0]
        torch.testing.assert_close(own, alone, rtol=1e-10, atol=1e-10)
    moved = tower(values[0][None], grids[0].flip(0)[None], AttentionMask(causal=False))[0]
    assert not torch.allclose(moved, found[0])


@torch.no_grad()
def test_merged_patches_are_the_four_that_lie_together():
    """A connector that sums the first value of four patches, on a picture whose pixels are its coordinates."""
    model, batch, _ = make("model.connector.merge=2", 'model.connector.kind="linear"')
    model.vision = None
    weight = torch.zeros(24, 4, 12, dtype=torch.double)
    weight[0, :, 0] = 1.0
    model.connector.project = torch.nn.Linear(48, 24, dtype=torch.double)
    model.connector.project.weight.copy_(weight.flatten(1))
    model.connector.project.bias.zero_()
    pictures = batch["pictures"]
    row = 0
    pictures.patches[row, :, 0] = (10 * pictures.grid[row, :, 0] + pictures.grid[row, :, 1]).to(torch.uint8)
    seen = model.see(pictures)[row, :, 0]
    mean, std = model.cfg.patches.mean[0], model.cfg.patches.std[0]
    for token in (batch["slots"][row] >= 0).nonzero()[:, 0].tolist():
        slot = int(batch["slots"][row, token])
        top, left = pictures.grid[row, slot].tolist()
        assert top % 2 == 0 and left % 2 == 0
        wanted = sum((10 * r + c) / 255 - mean for r in (top, top + 1) for c in (left, left + 1)) / std
        assert float(seen[slot // 4]) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted(kind):
    model, _, _ = make(*KINDS[kind])
    assert sum(p.numel() for p in model.parameters()) == model.cfg.num_parameters()


def a_step(words: list[str]) -> tuple[Engine, dict]:
    config = config_of(*words)
    objective = OBJECTIVES["causal"][1](config.objective)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    engine = build_engine(config, World(rank, size, torch.device("cpu")), objective)
    stream, each = synthetic_stream(config), 2 // size
    # Row 0 is full of pictures, row 1 has none: of two data ranks one sees nothing.
    rows = [to_torch(stream.read(row, 1)) for row in range(engine.data_rank * each, (engine.data_rank + 1) * each)]
    values, _ = train_step(engine, objective, [objective.collate(row) for row in rows], 1e-2)
    return engine, {name: float(torch.as_tensor(value)) for name, value in values.items()}


def numbers(words: list[str]) -> dict:
    return a_step(words)[1]


@pytest.mark.parametrize("frozen", ["[]", '["vision.*"]', '["layers.*", "embed.*", "head.*", "norm.*", "connector.*"]'])
def test_a_rank_without_any_picture_keeps_up(frozen):
    words = ["train.micro_batch=1", "train.global_batch=2", f"optim.freeze={frozen}"]
    alone = numbers(words)
    for found in run_ranks(numbers, 2, [*words, "parallel.dp_shard=2"], timeout=60):
        assert found == pytest.approx(alone, rel=1e-10)


def test_what_is_frozen_has_no_gradient_and_no_state_and_stays():
    words = ["train.micro_batch=1", "train.global_batch=2"]
    config = config_of(*words)
    fresh = build_engine(config, World(0, 1, torch.device("cpu")), OBJECTIVES["causal"][1](config.objective))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict()["model"].items()}
    engine, _ = a_step([*words, 'optim.freeze=["vision.*", "layers.1.*"]', 'optim.lr_ratios={"connector.*"=0.0001}'])
    state = engine.state_dict()
    for name, tensor in state["model"].items():
        frozen = name.startswith(("vision.", "layers.1."))
        assert torch.equal(tensor, before[name]) == frozen, name
        assert any(key.endswith(f".{name}") for key in state["optimizer"]) != frozen
        if name.startswith("connector.") and name.endswith("weight"):
            assert float((tensor - before[name]).abs().max()) < 1e-4 * 1e-2 * 2  # its own rate
        elif name == "layers.0.mlp.up.weight":
            assert float((tensor - before[name]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.patches=30", "model.connector.merge=2"], "data.patches = 30: must be a positive multiple of .* = 4"),
        (["data.patches=30", "parallel.tp=4"], "data.patches = 30: must be a positive multiple of .* parallel.tp = 4"),
        (["data.patches=0"], "data.patches = 0: must be a positive"),
        (["model.image_token=40"], "model.image_token = 40 is not below model.vocab_size = 40"),
        (["model.vision.class_token=true", "model.connector.merge=2"], "class_token is set: it has no place"),
        (["model.connector.queries=3"], "a resampler needs queries"),
        (["model.vision.heads=3"], "model.vision.hidden = 16 is not divisible by model.vision.heads = 3"),
        (["model.vision.output_layer=-4"], "model.vision.output_layer = -4, but there are 2 layers"),
        (["model.patches.std=[1, 0, 1]"], "model.patches.std"),
        (['model.family="decoder"', "model.vision=0"], "model.vision"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_a_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(*words)
    assert "\n" not in str(caught.value)


def test_pictures_for_a_family_that_sees_none():
    with pytest.raises(ValueError, match=r'data.patches = 8, but model.family = "decoder" sees no pictures'):
        resolve("tiny", ["data.patches=8"])


def test_a_pattern_that_freezes_nothing_is_a_mistake():
    with pytest.raises(ValueError, match=r"optim.freeze: 'visoin.\*' matches no parameter of VLM"):
        a_step(['optim.freeze=["visoin.*"]'])

"""The certifier on models that see: layouts of 2 and 4 agree, and bugs that only pictures show are named."""

import pytest
import torch

from launch.commands.verify import Certifier, _rounds
from parallel.layouts import describe_layout
from parallel.mesh import ParallelConfig
from parallel.world import World
from pretrain.config import resolve
from pretrain.models.vlm import model as vlm
from pretrain.shrink import shrink
from pretrain.verify import changed
from tests.launch.test_verify_bugs import ALONE, check, nothing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
KINDS = {
    "tower": ("tiny-vlm", ["model.vision.class_token=true", "model.vision.output_layer=-2"]),
    "merged": ("tiny-vlm", ["model.connector.merge=2", "model.moe.experts=4", "model.moe.ffn=64"]),
    "free": ("tiny-vlm-free", []),
}
LAYOUTS = {
    "tower": [{"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2, "stage_layers": (0, 4)}, {"cp": 2, "tp": 2}],
    "merged": [{"dp_shard": 2, "tp": 2, "ep": 2}, {"pp": 2, "cp": 2, "ep": 2}],
    "free": [{"tp": 2, "pp": 2, "schedule": "interleaved1f1b"}, {"dp_replicate": 2, "dp_shard": 2}],
}


def make_certifier(folder, kind: str) -> Certifier:
    recipe, words = KINDS[kind]
    plain = ["train.precision=fp32", "model.heads=4", "model.layers=4"]
    small, _ = shrink(resolve(recipe, [*plain, *words])[0], {**ALONE, "pp": 2, "tp": 2, "cp": 2}, 4)
    small = changed(small, {"train.global_batch": 8, "train.micro_batch": 2})
    return Certifier(small, 2, str(folder), timeout=60, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_four(kind, tmp_path):
    certifier = make_certifier(tmp_path, kind)
    for degrees in LAYOUTS[kind]:
        parallel = ParallelConfig(**{**ALONE, **degrees})
        verdict = certifier.verify(parallel, {"adamw": _rounds(certifier.config, parallel)["adamw"]})
        assert verdict.agrees, (describe_layout(parallel), verdict.refused, verdict.diagnosis())


@pytest.fixture(scope="module")
def certifier(tmp_path_factory):
    return make_certifier(tmp_path_factory.mktemp("reference"), "tower")


def test_without_a_bug_they_agree(certifier):
    assert check(certifier, nothing, dp_shard=2).agrees


def slots_of_the_whole_row(world: World) -> None:
    """Under tensor parallelism each process takes the features of the first part of the row's tokens."""
    forward = vlm.VLM.forward

    def wrong(self, x, *args, slots=None, **kwargs):
        self.slots = torch.nn.Identity() if self.slots is None else self.slots
        length = slots.shape[1] // world.size
        shifted = slots.roll(length * world.rank, 1) if world.rank else slots
        return forward(self, x, *args, slots=shifted, **kwargs)

    vlm.VLM.forward = wrong


def test_features_in_the_wrong_part_of_the_sequence(certifier):
    verdict = check(certifier, slots_of_the_whole_row, tp=2)
    assert not verdict.agrees and any("loss" in line or "gradient" in line for line in verdict.diagnosis())

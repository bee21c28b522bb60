"""The certifier on a vision transformer: its layouts agree, and a class read off the wrong place shows."""

from functools import partial

import pytest

from launch.commands.verify import Certifier, _rounds
from parallel.mesh import ParallelConfig
from parallel.world import World
from pretrain.config import resolve
from pretrain.models.vit.model import ViT
from pretrain.shrink import shrink
from pretrain.verify import changed
from tests.launch.test_verify_bugs import ALONE, nothing, planted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def certifier(tmp_path_factory):
    small, _ = shrink(resolve("tiny-vit", ["train.precision=fp32"])[0], {**ALONE, "pp": 2, "tp": 2, "cp": 2}, 4)
    small = changed(small, {"train.global_batch": 8, "train.micro_batch": 2})
    return Certifier(small, 2, str(tmp_path_factory.mktemp("reference")), timeout=60, device="cpu")


def the_last_patch_instead_of_the_class_token(world: World) -> None:
    ViT.logits = lambda self, hidden, held=None: self.head(self.rows(hidden)[:, -1])


@pytest.mark.parametrize(
    "degrees", [{"dp_shard": 2, "tp": 2}, {"cp": 2, "tp": 2}, {"pp": 2, "cp": 2}, {"dp_replicate": 2, "dp_shard": 2}]
)
def test_layouts_of_four(certifier, degrees):
    parallel = ParallelConfig(**{**ALONE, **degrees})
    verdict = certifier.verify(parallel, _rounds(certifier.config, parallel))
    assert verdict.agrees, (verdict.refused, verdict.diagnosis())


@pytest.mark.parametrize(
    ("bug", "found"), [(nothing, ""), (the_last_patch_instead_of_the_class_token, "computes another function")]
)
def test_the_wrong_place_shows(certifier, monkeypatch, bug, found):
    monkeypatch.setattr(certifier, "measure", partial(planted, bug))
    parallel = ParallelConfig(**{**ALONE, "dp_shard": 2})
    verdict = certifier.verify(parallel, _rounds(certifier.config, parallel))
    assert verdict.agrees == (not found)
    assert found in " ".join(verdict.diagnosis()), verdict.diagnosis()

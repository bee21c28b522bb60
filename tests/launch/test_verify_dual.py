"""The certifier on objectives that compare samples: layouts agree, and negatives that are missing show."""

from functools import partial

import pytest

from launch.cli import main
from launch.commands.verify import Certifier, _rounds
from parallel.mesh import ParallelConfig
from parallel.world import World
from pretrain.config import resolve
from pretrain.objectives.contrastive import ContrastiveObjective
from pretrain.shrink import shrink
from pretrain.verify import changed
from tests.launch.test_verify_bugs import ALONE, nothing, planted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def certifier(tmp_path_factory):
    small, _ = shrink(resolve("tiny-clip", ["train.precision=fp32"])[0], {**ALONE, "tp": 2}, 4)
    small = changed(small, {"train.global_batch": 8, "train.micro_batch": 8})
    return Certifier(small, 2, str(tmp_path_factory.mktemp("reference")), timeout=60, device="cpu")


def negatives_of_this_process_alone(world: World) -> None:
    ContrastiveObjective.across = lambda self, gather: None


def gradients_of_own_features_alone(world: World) -> None:
    """What others did with a process's features does not come back to it."""
    across = ContrastiveObjective.across

    def wrong(self, gather):
        def cut(rows):
            everyone, first = gather(rows.detach())
            own = everyone.clone()
            own[first : first + len(rows)] = rows
            return own, first

        across(self, cut)

    ContrastiveObjective.across = wrong


@pytest.mark.parametrize("degrees", [{"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}])
def test_layouts_of_four(certifier, degrees):
    parallel = ParallelConfig(**{**ALONE, **degrees})
    verdict = certifier.verify(parallel, _rounds(certifier.config, parallel))
    assert verdict.agrees, (verdict.refused, verdict.diagnosis())


@pytest.mark.parametrize(
    ("bug", "found"),
    [
        (nothing, ""),
        (negatives_of_this_process_alone, "computes another function"),
        (gradients_of_own_features_alone, "its gradient is off"),
    ],
)
def test_what_negatives_do_shows(certifier, monkeypatch, bug, found):
    monkeypatch.setattr(certifier, "measure", partial(planted, bug))
    parallel = ParallelConfig(**{**ALONE, "dp_shard": 2})
    verdict = certifier.verify(parallel, _rounds(certifier.config, parallel))
    assert verdict.agrees == (not found)
    assert found in " ".join(verdict.diagnosis()), verdict.diagnosis()


def test_layouts_that_would_miss_negatives_are_refused(capsys):
    assert main(["verify-layout", "tiny-clip", "parallel.pp=2", "parallel.dp_shard=1"]) == 2
    assert "parallel.pp = 2: an objective that compares samples" in capsys.readouterr().err

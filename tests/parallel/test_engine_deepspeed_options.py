"""What a recipe asks of the DeepSpeed engine is refused before anything starts; needs no package."""

import importlib.metadata

import pytest

from parallel.engine import check_installed
from pretrain.config import resolve

DEEPSPEED = "engine=deepspeed"


def test_a_recipe_names_what_is_cut_and_where_it_lies():
    config, _ = resolve("tiny", [DEEPSPEED, "deepspeed.zero=3", "deepspeed.offload_optimizer=cpu"])
    assert config.deepspeed.zero == 3 and config.deepspeed.offload_optimizer == "cpu"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.pp=2", r'parallel.pp = 2: set parallel.pp to 1, or take engine = "torch"'),
        ("parallel.ep=2", r'parallel.ep = 2: .*engine = "torch"'),
        ("parallel.cp=2", r'parallel.cp = 2: .*engine = "torch"'),
        ("parallel.tp=2", r'parallel.tp = 2: .*engine = "torch"'),
        ("optim.name=muon", r'optim.name = "muon": set optim.name to "adamw", or take engine = "torch"'),
        ("optim.ema=0.99", r'optim.ema = 0.99: .*engine = "torch"'),
        ("train.precision=fp64", r'train.precision = "fp64": set train.precision to "fp32" or "bf16"'),
        ("deepspeed.zero=4", r"deepspeed.zero"),
        ("deepspeed.stage=2", r"deepspeed.stage"),
        ("deepspeed.offload_parameters=cpu", r"needs deepspeed.zero = 3, which is 2; raise it"),
        ("deepspeed.offload_optimizer=nvme", r"needs deepspeed.zero = 3 or more, which is 2; raise it"),
    ],
)
def test_what_it_cannot_is_refused_with_the_cure(override, words):
    with pytest.raises(ValueError, match=words):
        resolve("tiny", [DEEPSPEED, override])


def test_a_place_on_nvme_needs_a_folder():
    with pytest.raises(ValueError, match="nvme_path is empty"):
        resolve("tiny", [DEEPSPEED, "deepspeed.zero=3", "deepspeed.offload_optimizer=nvme"])


def test_missing_and_untested_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.18.2")
    with pytest.raises(ValueError, match=r"deepspeed 0.18.2 is installed, tested are 0.19.8 and later below 0.20"):
        check_installed("deepspeed")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'pretrain-stack\[deepspeed\]'"):
        check_installed("deepspeed")

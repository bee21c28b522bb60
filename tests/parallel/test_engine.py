"""The table of engines: what is refused, by whom, and what the message says."""

import importlib.metadata
from dataclasses import replace

import pytest
import torch

from parallel.engine import ENGINES, check_engine, check_installed
from pretrain.config import resolve

MUON = {"optim.name": "muon", "model.family": "decoder", "train.precision": "fp32"}


def test_what_an_engine_cannot_is_named_with_its_cures_and_who_can():
    with pytest.raises(ValueError, match=r'cannot do optim.name = "muon": set optim.name to "adamw".*engine = "torch"'):
        check_engine("megatron", MUON)
    check_engine("torch", MUON)
    check_engine("megatron", MUON | {"optim.name": "adamw"})


def test_no_engine_that_can_is_said_too(monkeypatch):
    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], only={"optim.name": ()}))
    monkeypatch.delitem(ENGINES, "deepspeed", raising=False)
    with pytest.raises(ValueError, match="no engine can"):
        check_engine("megatron", MUON)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine=megatorn"], "unknown: one of torch, megatron"),
        (["engine=megatron", "train.compile=on"], "train.compile"),
        (["engine=megatron", "train.precision=fp32", 'optim.freeze=["layers.0.*"]'], "optim.freeze"),
        (["engine=megatron", "train.precision=fp32", "parallel.schedule=gpipe"], '"interleaved1f1b"'),
    ],
)
def test_a_recipe_fails_before_anything_starts(overrides, words):
    with pytest.raises(ValueError, match=words):
        resolve("tiny", overrides)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(ENGINES, "megatron", replace(ENGINES["megatron"], package="no-such-distribution"))
    with pytest.raises(ValueError, match=r"not installed: pip install 'pretrain-stack\[megatron\]'"):
        check_installed("megatron")


@pytest.mark.parametrize(
    ("version", "fine"), [("0.16.0", False), ("0.16.1", True), ("0.16.2+cu12", True), ("0.17.0rc1", False)]
)
def test_an_untested_version_is_refused(monkeypatch, version, fine):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if fine:
        check_installed("megatron")
    else:
        with pytest.raises(ValueError, match=f"{version.split('+')[0]} is installed, tested are 0.16.1"):
            check_installed("megatron")


@pytest.mark.parametrize(("engine", "version", "fine"), [("megatron", "0.18.0", True), ("deepspeed", "0.21.0", False)])
def test_a_newer_megatron_may_be_tried_on_gpus(monkeypatch, engine, version, fine):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if fine:
        with pytest.warns(UserWarning, match=f"{version} is newer than those tested"):
            check_installed(engine)
    else:
        with pytest.raises(ValueError, match="is installed, tested are"):
            check_installed(engine)

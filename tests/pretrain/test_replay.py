"""Replayed steps: of batches that changed, of old steps, of runs whose data changed."""

import shutil
from pathlib import Path

import pytest
import torch

from launch.cli import main
from parallel.world import World
from pretrain.config import load_run_config
from pretrain.replay import replay, with_batch
from pretrain.train import train
from tests.data_pipeline.conftest import make_shards, unique_documents
from tests.pretrain.test_train import ALONE, losses, small_config


@pytest.fixture
def source(tmp_path) -> str:
    """Two shards of a source, as an override; its glob matches more."""
    folder = make_shards(tmp_path / "data", unique_documents([40, 13, 90, 7] * 12), num_shards=2, vocab_size=2048)
    return f'data.sources=[{{name = "a", shards = "{folder}/train-*.tar"}}]'


@pytest.fixture
def run(tmp_path, tiny_shards, source) -> Path:
    """Two steps of 8 samples, and from there on 4 of 4."""
    run = tmp_path / "run"
    for batch, stop in ((8, 2), (4, 6)):
        chosen = (source, "train.steps=6", "checkpoint.every=2", f"train.global_batch={batch}", f"train.stop_at={stop}")
        train(small_config(run, tiny_shards, *chosen), ALONE)
    return run


def test_steps_are_replayed_with_the_batch_that_they_had(run, capsys, monkeypatch) -> None:
    """From checkpoints, and over the change where those are gone."""
    logged, config = losses(run), load_run_config(run)
    capsys.readouterr()
    for step in (2, 3, 6):
        found = replay(config, ALONE, step)
        assert found.loss == pytest.approx(logged[step - 1], rel=1e-6), step
    assert "step 6 from the checkpoint of step 4 on; steps to train anew before it: 1" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints/step-00000002")
    monkeypatch.setattr("pretrain.replay.QUIET", 0.0)
    found = replay(config, ALONE, 4)
    assert found.start == 0 and found.loss == pytest.approx(logged[3], rel=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "replaying step 4 from the initial weights on; steps to train anew before it: 3"
    told = [line.split(",")[0] for line in lines if "to go" in line]
    assert told == [f"step {step} trained anew" for step in (1, 2, 3)]


def test_a_step_of_a_derived_run_begins_with_its_weights(run, tmp_path, tiny_shards, source) -> None:
    """Its checkpoint of step 0, not initial weights; its samples go on from where that one stood."""
    derived = tmp_path / "derived"
    assert main(["checkpoint", "merge", str(run), str(run), "--out", str(derived)]) == 0
    train(small_config(derived, tiny_shards, source, "train.steps=2"), ALONE)
    found = replay(load_run_config(derived), ALONE, 2)
    assert found.loss == pytest.approx(losses(derived)[1], rel=1e-6)


def test_other_documents_than_the_ledger_has_are_refused(run, tmp_path) -> None:
    config = load_run_config(run)
    ledger = (run / "ledger.bin").read_bytes()
    (run / "ledger.bin").unlink()
    with pytest.raises(FileNotFoundError, match="there is no ledger"):
        replay(config, ALONE, 3)
    (run / "ledger.bin").write_bytes(ledger)
    shutil.rmtree(run / "checkpoints")  # and with them what the mixture's history knows of the data
    make_shards(tmp_path / "more", unique_documents([50] * 9), vocab_size=2048)
    for file in (tmp_path / "more").glob("train-00000*"):
        shutil.copy(file, tmp_path / "data" / file.name.replace("00000", "00002"))
    with pytest.raises(ValueError, match=r"step 1: .*ledger.bin has other documents than the run's sources give now"):
        replay(config, ALONE, 3)


def test_micro_batches_come_out_even_and_a_contrastive_step_stays_whole(tmp_path, tiny_shards) -> None:
    config = small_config(tmp_path, tiny_shards, "train.global_batch=16", "train.micro_batch=8", "parallel.dp_shard=2")
    world = World(0, 2, torch.device("cpu"))
    compared = config.model_copy(update={"objective": config.objective.model_copy(update={"name": "contrastive"})})
    for chosen, batch, micro_batch in ((config, 16, 8), (config, 24, 4), (config, 64, 8), (compared, 64, 32)):
        train = with_batch(chosen, world, batch).train
        assert (train.global_batch, train.micro_batch) == (batch, micro_batch)

"""Which checkpoints stay, pins, and going back."""

import json
import logging
from pathlib import Path

import pytest
import torch

from checkpoints.manifest import Manifest
from checkpoints.retention import is_pinned, pin, read_metrics, rewind, unpin
from checkpoints.store import CheckpointStore


def save(store: CheckpointStore, step: int, **metrics: float) -> Path:
    return store.save(step, {"w": torch.full((2,), float(step))}, {}, {"metrics": metrics} if metrics else {})


def steps(folder: Path) -> list[int]:
    return [info.step for info in CheckpointStore(folder).list()]


LOSSES = {1: 5.0, 2: 3.0, 3: 2.0, 4: 4.0, 5: float("nan"), 6: 2.5, 7: 9.0}


@pytest.mark.parametrize(
    ("mode", "count", "kept"), [("min", 1, [3, 6, 7]), ("min", 2, [3, 6, 7]), ("min", 3, [2, 3, 6, 7])]
)
def test_the_best_stay_beside_the_newest(tmp_path: Path, mode: str, count: int, kept: list[int]):
    store = CheckpointStore(tmp_path, keep=2, best="eval_loss", best_mode=mode, keep_best=count)  # type: ignore[arg-type]
    for step, loss in LOSSES.items():
        save(store, step, eval_loss=loss)
    assert steps(tmp_path) == kept


def test_higher_may_be_better_and_steps_without_the_number_are_none_of_the_best(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1, best="accuracy", best_mode="max")
    for step, accuracy in ((1, 0.2), (2, 0.7), (3, None), (4, 0.7), (5, 0.1), (6, None)):
        save(store, step, **({"accuracy": accuracy} if accuracy is not None else {"eval_loss": 1.0}))
    assert steps(tmp_path) == [4, 6]  # of equals, the newer


def test_metrics_leave_the_manifest_as_it_was(tmp_path: Path):
    path = save(CheckpointStore(tmp_path), 1, eval_loss=0.5)
    assert read_metrics(path) == {"eval_loss": 0.5}
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 1
    assert Manifest.read(path).lineage == ()


def test_pinned_ones_stay_until_they_are_unpinned(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    pin(tmp_path, 1)
    save(store, 2)
    save(store, 3)
    assert steps(tmp_path) == [1, 3] and is_pinned(tmp_path, 1)
    assert [info.pinned for info in store.list()] == [True, False]
    assert store.verify(1) == []  # the pin is no part of the checkpoint
    unpin(tmp_path, 1)
    save(store, 4)
    assert steps(tmp_path) == [4]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 in .*: it has steps 4"):
        pin(tmp_path, 9)


def test_nothing_is_pruned_before_the_new_one_is_whole(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    with pytest.raises(ValueError, match="was not saved"):
        store.save(2, {"w": 3}, {}, {})  # type: ignore[dict-item]
    assert steps(tmp_path) == [1]


def test_going_back_sets_the_newer_aside(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=9)
    for step in (1, 2, 3, 4):
        save(store, step)
    pin(folder, 4)
    (folder / "step-00000003" / "state.json").unlink()  # broken ones go too
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 4}\n')
    aside = rewind(folder, 2, also=[metrics, tmp_path / "missing"])
    assert aside is not None and aside.parent == folder
    assert store.newest_whole() == 2 and steps(folder) == [1, 2]
    assert (aside / "metrics.jsonl").read_text() == metrics.read_text()
    lost = CheckpointStore(aside)
    assert [info.step for info in lost.list()] == [3, 4] and lost.verify(4) == [] and is_pinned(aside, 4)
    save(store, 4)
    assert not is_pinned(folder, 4) and store.newest_whole() == 4
    assert rewind(folder, 4) is None
    assert steps(folder) == [1, 2, 4] and steps(aside) == [3, 4]


def test_going_back_needs_a_whole_checkpoint(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step 1 is not whole: .*state\.json is truncated"):
        rewind(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        rewind(tmp_path, 7)
    assert steps(tmp_path) == [1, 2]


def test_a_damaged_state_is_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2) / "state.json"
    content = bytearray(path.read_bytes())
    content[9] ^= 4
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.load(None, {"w": torch.zeros(2)})["step"] == 1
    assert "skipping a broken checkpoint" in caplog.text and "step-00000002/state.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"keep": 0}, {"keep_every": 0}, {"best": "loss", "keep_best": 0}, {"best_mode": "lowest"}]
)
def test_impossible_retention_is_refused(tmp_path: Path, wrong: dict):
    with pytest.raises(ValueError, match=r"checkpoint\.(keep|best)"):
        CheckpointStore(tmp_path, **wrong)

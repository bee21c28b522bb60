"""Saves of a run: in the background and not, by time, the best, and those that fail."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints import commit
from checkpoints.collective import CheckpointError
from checkpoints.manifest import Manifest
from checkpoints.remote import Remote
from checkpoints.store import CheckpointStore
from launch.cli import main
from parallel.world import World
from pretrain.config import load_run_config, resolve
from pretrain.train import train
from tests.ranks import run_ranks
from tests.small import small_overrides

ALONE = World(0, 1, torch.device("cpu"))


def run(folder: Path, shards: Path, *overrides: str, world: World = ALONE) -> CheckpointStore:
    train(resolve("tiny", [*small_overrides(folder, shards), *overrides])[0], world)
    return CheckpointStore(folder / "checkpoints")


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.list()]


def test_in_the_background_the_same_is_saved(tmp_path, tiny_shards, capsys):
    chosen = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=9")
    behind = run(tmp_path / "behind", tiny_shards, *chosen)
    assert "step-00000001 in the background" in capsys.readouterr().out
    before = run(tmp_path / "before", tiny_shards, *chosen, "checkpoint.async=false")
    assert "in the background" not in capsys.readouterr().out
    assert steps(behind) == steps(before) == [1, 2, 3, 4]
    for left, right in zip(behind.list(), before.list(), strict=True):
        assert Manifest.read(left.path).files == Manifest.read(right.path).files
    assert "async = false" in (tmp_path / "before/config.toml").read_text()
    assert not load_run_config(tmp_path / "before").checkpoint.in_background


def _hasty(folder: Path, shards: Path) -> list[int]:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    chosen = ("train.steps=6", "checkpoint.every=100", "checkpoint.keep=9")
    return steps(run(folder, shards, *chosen, "checkpoint.every_minutes=1e-9", world=world))


def test_time_makes_all_ranks_save(tmp_path, tiny_shards):
    found = run_ranks(_hasty, 2, tmp_path / "run", tiny_shards, timeout=120)
    assert found[0] == found[1] and found[0][-1] == 6
    assert 2 <= len(found[0]) <= 4  # asked for in one step, done after the next


def test_the_best_evaluation_is_kept(tmp_path, tiny_shards):
    evaluated = ("eval.every=1", f"eval.shards={tiny_shards}/train-*.tar", "eval.max_samples=8")
    often = ("train.steps=5", "checkpoint.every=1", "checkpoint.keep=1", "optim.lr=0.3")
    store = run(tmp_path / "run", tiny_shards, *often, *evaluated, "checkpoint.best=eval_loss")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(measured, key=measured.get)
    assert steps(store) == sorted({best, 5})
    state = json.loads((tmp_path / f"run/checkpoints/step-{best:08d}/state.json").read_text())
    assert state["metrics"]["eval_loss"] == pytest.approx(measured[best])


def full_disk(monkeypatch: pytest.MonkeyPatch, bad: range) -> list[int]:
    """The disk is full when shards are written for the n-th time, n in `bad`."""
    real, calls = commit.write_shard, []

    def write(path, pieces, contents):
        calls.append(len(calls))
        if calls[-1] in bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, pieces, contents)

    monkeypatch.setattr(commit, "write_shard", write)
    return calls


CHOSEN = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=9")
PARTS = 2  # files that a checkpoint of one process has


def test_a_failed_save_is_named_and_training_goes_on(tmp_path, tiny_shards, monkeypatch, capsys):
    full_disk(monkeypatch, range(PARTS, PARTS + 1))
    store = run(tmp_path / "run", tiny_shards, *CHOSEN)
    out = capsys.readouterr().out
    assert steps(store) == [1, 3, 4]
    said = [line for line in out.splitlines() if "tries again" in line]
    assert len(said) == 1
    assert said[0].startswith("a save in the background failed, the next one tries again: step 2 was not saved")
    assert said[0].endswith("No space left on device; free some space")


def test_the_last_save_is_tried_again(tmp_path, tiny_shards, monkeypatch, capsys):
    full_disk(monkeypatch, range(3 * PARTS, 3 * PARTS + 1))
    assert steps(run(tmp_path / "run", tiny_shards, *CHOSEN)) == [1, 2, 3, 4]
    assert "background failed, the next one tries again: step 4 was not saved" in capsys.readouterr().out


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_last_save_that_cannot_be_written_is_raised(tmp_path, tiny_shards, monkeypatch, background):
    full_disk(monkeypatch, range(3 * PARTS, 99))
    with pytest.raises(CheckpointError, match=r"step 4 was not saved in .*earlier checkpoints are untouched"):
        run(tmp_path / "run", tiny_shards, *CHOSEN, f"checkpoint.async={background}")
    assert CheckpointStore(tmp_path / "run/checkpoints").newest_whole() == 3
    monkeypatch.undo()
    assert steps(run(tmp_path / "run", tiny_shards, *CHOSEN)) == [1, 2, 3, 4]


def test_a_run_goes_on_from_the_copy_elsewhere(tmp_path, tiny_shards, capsys):
    chosen = ("train.steps=4", f"checkpoint.remote=file://{tmp_path}/elsewhere")
    whole = run(tmp_path / "whole", tiny_shards, "train.steps=4")
    run(tmp_path / "lost", tiny_shards, *chosen, "train.stop_at=2")
    moved = run(tmp_path / "moved", tiny_shards, *chosen)
    assert f"fetched the checkpoint of step 2 from file://{tmp_path}/elsewhere" in capsys.readouterr().out
    left, right = (Manifest.read(store.folder / "step-00000004") for store in (whole, moved))
    assert left.files == right.files
    assert main(["checkpoint", "rewind", str(tmp_path / "moved"), "3"]) == 2  # not there: nothing is set aside
    assert main(["checkpoint", "rewind", str(tmp_path / "moved"), "2"]) == 0
    assert Remote(f"file://{tmp_path}/elsewhere").newest_whole() == 2
    assert steps(run(tmp_path / "moved", tiny_shards, *chosen, "train.stop_at=3")) == [2, 3]


def test_a_run_killed_while_it_replaced_a_checkpoint_goes_on_from_the_old_one(tmp_path, tiny_shards, capsys):
    folder = run(tmp_path / "run", tiny_shards, "train.steps=3", "train.stop_at=2").folder
    (folder / "step-00000002").rename(folder / ".replaced-step-00000002")
    assert steps(run(tmp_path / "run", tiny_shards, "train.steps=3")) == [2, 3]
    assert "at step 2" in capsys.readouterr().out

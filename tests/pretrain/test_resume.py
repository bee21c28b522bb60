"""Going on with other settings, on another machine, and after a start that died before it saved anything."""

import pytest
import torch

from launch.commands.derive import configure
from parallel.world import World
from pretrain import train as train_module
from pretrain.config import load_run_config
from pretrain.train import train
from tests.pretrain.test_train import small_config, tensors

ALONE = World(0, 1, torch.device("cpu"))
HALF = 'optim.freeze=["layers.0.*"]'


def test_other_parameters_are_trained_also_after_a_start_that_died(tmp_path, tiny_shards, capsys, monkeypatch):
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=6", "train.stop_at=2", HALF), ALONE)
    frozen = {name: tensor for name, tensor in tensors(tmp_path / "run", 2).items() if ":layers.0." in name}
    assert frozen and not any("optimizer" in name for name in frozen)

    def die(*_) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(train_module, "train_step", die)
        train(small_config(tmp_path / "run", tiny_shards, "train.steps=6"), ALONE)
    assert load_run_config(tmp_path / "run").optim.freeze == ()
    capsys.readouterr()
    assert train(small_config(tmp_path / "run", tiny_shards, "train.steps=6"), ALONE).step == 6
    said = capsys.readouterr().out
    assert "changed since the last start: optim.freeze ['layers.0.*'] -> []" in said
    assert "the optimizer's state starts anew" in said
    after = tensors(tmp_path / "run", 6)
    assert all(not torch.equal(after[name], tensor) for name, tensor in frozen.items() if name.endswith("q.weight"))
    assert any("optimizer" in name and "exp_avg.layers.0." in name for name in after)


def test_a_place_in_the_data_is_known_without_the_last_starts_config(tmp_path, tiny_shards):
    """Only checkpoints are copied to other machines."""
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", "train.stop_at=2"), ALONE)
    (tmp_path / "run/config.toml").unlink()
    for other in ("data.seq_len=32", "run.seed=2"):
        with pytest.raises(ValueError, match=r"its place in the data counts on that; set it back"):
            train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", other), ALONE)
    assert train(small_config(tmp_path / "run", tiny_shards, "train.steps=4"), ALONE).step == 4


def test_a_restart_of_a_new_run_continues_it(tmp_path, tiny_shards, monkeypatch):
    new = small_config(tmp_path / "run", tiny_shards, "train.steps=4", "run.resume=never")
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=4", "train.stop_at=2"), ALONE)
    with pytest.raises(ValueError, match="holds a run at step 2"):
        train(new, ALONE)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(new, ALONE).step == 4


def test_a_derived_run_leaves_the_copies_of_the_first_alone(tmp_path, tiny_shards):
    remote = f"checkpoint.remote=file://{tmp_path}/copies"
    train(small_config(tmp_path / "run", tiny_shards, "train.steps=2", remote), ALONE)
    assert configure(tmp_path / "run", tmp_path / "new").checkpoint.remote == ""
    assert configure(tmp_path / "run", tmp_path / "new", ["checkpoint.remote=s3://b/new"]).checkpoint.remote

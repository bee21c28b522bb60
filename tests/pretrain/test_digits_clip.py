"""The recipe digits-clip: learns from captions alone to name digits that it has not seen."""

import pytest
import torch

from data_pipeline.sources.digits import NAMES, write_digits
from parallel.world import World
from pretrain.caption import name, retrieve
from pretrain.config import resolve
from pretrain.data import make_stream, open_held_out
from pretrain.load import load_trained
from pretrain.train import train
from pretrain.zero_shot import prompts

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.mark.slow
def test_held_out_digits_are_named_without_labels(tmp_path, monkeypatch):
    """Measured: 94.8 % after the recipe's 150 steps, 18 CPU seconds."""
    monkeypatch.chdir(tmp_path)
    write_digits("data/digits")
    config = resolve("digits-clip", ["train.steps=120", "eval.every=0"])[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config, World(0, 1, torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
    trained = load_trained(tmp_path / config.run.dir)
    stream = make_stream(trained.config, open_held_out(trained.config), shuffle=False)
    said = list(name(trained, stream, 1000, prompts(NAMES, ["a handwritten {}"])))
    assert len(said) == stream.num_samples > 300
    right = sum(one.right for one in said) / len(said)
    assert right > 0.9
    found = retrieve(trained, stream, 1000)
    assert found["image_to_text_r1"] == pytest.approx(right)  # the captions are the classes' prompts
    assert right < found["image_to_text_r5"] <= found["image_to_text_r10"] == 1.0  # of ten captions
    assert found["text_to_image_r1"] >= 0.9

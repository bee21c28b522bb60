"""A run's sources as one stream, and its documents by name."""

import numpy as np
import pytest

from pretrain.data import open_datasets
from pretrain.mixture import open_stream
from tests.data_pipeline.conftest import make_shards
from tests.pretrain.test_train import small_config


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> str:
    """A source of 40 samples of 64 tokens that is read once."""
    folder = make_shards(tmp_path_factory.mktemp("forty") / "s", [np.arange(64)] * 40, vocab_size=2048)
    return f'data.sources=[{{name = "forty", shards = "{folder}/train-*.tar", epochs = 1.0}}]'


@pytest.mark.parametrize(
    ("batch", "cursor", "step", "enough"),
    [
        (10, 0, 0, True),
        (11, 0, 0, False),
        (15, 10, 2, True),  # 2 steps of 5 samples each before
        (16, 10, 2, False),
        (8, 8, 0, True),  # derived from a run that had read 8
        (8, 9, 0, False),
        (20, 40, 4, True),  # at its end
    ],
)
def test_sources_must_last_for_the_steps_that_are_left(
    tmp_path, tiny_shards, forty, batch: int, cursor: int, step: int, enough: bool
) -> None:
    chosen = [forty, "train.steps=4", f"train.global_batch={batch}", "train.micro_batch=1", "data.seq_len=64"]
    config = small_config(tmp_path, tiny_shards, *chosen)
    datasets = open_datasets(config, lambda action: action())
    opening = (config, datasets, None, cursor, step)
    if enough:
        open_stream(*opening)
        return
    with pytest.raises(ValueError, match="no sample after the first 40: all sources are used up"):
        open_stream(*opening)

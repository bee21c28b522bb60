"""The run's data: its shards, or a small built-in text when the recipe names none."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.reader import TokenDataset
from data_pipeline.build import TrainTokenizer, build
from data_pipeline.sources.stdlib import tiny_files
from pretrain.config import RunConfig

OnFirst = Callable[[Callable[[], Any]], Any]  # runs an action on rank 0 alone, while the others wait


def open_dataset(config: RunConfig, on_first: OnFirst) -> TokenDataset:
    """The training documents. Raises ValueError or FileNotFoundError for shards that cannot be used."""
    if len(config.data.sources) > 1:
        raise ValueError("data.sources: mixtures of several sources are not supported yet; name one source")
    if config.data.sources:
        return _open(config, config.data.sources[0].shards)
    folder = Path(config.run.dir) / "data"
    on_first(lambda: build_tiny_shards(folder))
    return _open(config, str(folder / "train-*.tar"))


def build_tiny_shards(folder: Path) -> None:
    """A few hundred KB of Python's own library, for a first run without any data."""
    build(tiny_files(), folder, tokenizer=TrainTokenizer(vocab_size=2048), workers=1, progress=False)


def open_held_out(config: RunConfig) -> TokenDataset:
    """The held-out documents."""
    return _open(config, config.eval.shards)


def _open(config: RunConfig, shards: str) -> TokenDataset:
    return TokenDataset(shards, vocab_size=config.model.vocab_size or None)


def with_vocabulary(config: RunConfig, dataset: TokenDataset) -> RunConfig:
    """The config with the model's vocabulary size filled in from the data where the recipe left it open."""
    if config.model.vocab_size:
        return config
    if dataset.info is None:
        raise ValueError("model.vocab_size is not set and the shards have no dataset.json to take it from; set it")
    model = config.model.model_copy(update={"vocab_size": dataset.info.vocab_size})
    return config.model_copy(update={"model": model})


def copy_tokenizer(dataset: TokenDataset, run_dir: Path) -> None:
    """Keep the data's tokenizer with the run, so that generating and exporting need nothing else."""
    if dataset.info is None:
        return
    source = dataset.paths[0].parent / dataset.info.tokenizer
    if source.is_dir() and not (run_dir / "tokenizer").exists():
        shutil.copytree(source, run_dir / "tokenizer")

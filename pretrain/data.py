"""The run's data: its shards, or a small built-in text when the recipe names none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.build import TrainTokenizer, build
from data_pipeline.reader import TokenDataset
from data_pipeline.sources.stdlib import tiny_files
from data_pipeline.tokenizer import load_tokenizer
from pretrain.config import RunConfig

OnFirst = Callable[[Callable[[], Any]], Any]  # runs an action on rank 0 alone, while the others wait


def open_dataset(config: RunConfig, on_first: OnFirst) -> TokenDataset:
    """The training documents. Raises ValueError or FileNotFoundError for shards that cannot be used."""
    if len(config.data.sources) > 1:
        raise ValueError("data.sources: mixtures of several sources are not supported yet; name one source")
    if config.data.sources:
        return _open(config, config.data.sources[0].shards)
    folder = Path(config.run.dir) / "data"
    on_first(lambda: build_tiny_shards(folder, config.tokenizer.path))
    return _open(config, str(folder / "train-*.tar"))


def build_tiny_shards(folder: Path, tokenizer: str = "") -> None:
    """A few hundred KB of Python's own library, for a first run without any data."""
    build(tiny_files(), folder, tokenizer=tokenizer or TrainTokenizer(vocab_size=2048), workers=1, progress=False)


def open_held_out(config: RunConfig) -> TokenDataset:
    """The held-out documents."""
    return _open(config, config.eval.shards)


def _open(config: RunConfig, shards: str) -> TokenDataset:
    return TokenDataset(shards, vocab_size=config.model.vocab_size or None)


def with_tokenizer(config: RunConfig) -> RunConfig:
    """The config with the vocabulary size of `tokenizer.path`, where the recipe names one. Raises ValueError when the
    model's vocabulary is too small for it.
    """
    if not config.tokenizer.path:
        return config
    needed = load_tokenizer(config.tokenizer.path).vocab_size
    if config.model.vocab_size and config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {needed} of tokenizer.path = "
            f"{config.tokenizer.path!r}; raise it, or leave it out to take the tokenizer's"
        )
    return _with_vocab_size(config, config.model.vocab_size or needed)


def with_vocabulary(config: RunConfig, dataset: TokenDataset) -> RunConfig:
    """The config with the model's vocabulary size filled in from the shards where it is still open. Raises ValueError
    when the shards were built with another vocabulary than the recipe's tokenizer has.
    """
    if dataset.info is None:
        if not config.model.vocab_size:
            raise ValueError(
                f"{dataset.paths[0].parent} has no dataset.json that tells the vocabulary; set tokenizer.path or "
                "model.vocab_size"
            )
        return config
    if config.tokenizer.path and load_tokenizer(config.tokenizer.path).vocab_size != dataset.info.vocab_size:
        raise ValueError(
            f"tokenizer.path = {config.tokenizer.path!r} has not the vocabulary of {dataset.info.vocab_size} that the "
            f"shards in {dataset.paths[0].parent} were built with; leave it out, or build the shards with it"
        )
    return _with_vocab_size(config, config.model.vocab_size or dataset.info.vocab_size)


def _with_vocab_size(config: RunConfig, vocab_size: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def check_tokenizer(config: RunConfig, dataset: TokenDataset, run_dir: Path) -> None:
    """Raises ValueError when the run, its recipe and its shards do not all have the same tokenizer."""
    known = {"tokenizer.path": Path(config.tokenizer.path) if config.tokenizer.path else None}
    known |= {"the shards": _of_shards(dataset), "the run": run_dir / "tokenizer"}
    prints = {name: (path, load_tokenizer(path).fingerprint) for name, path in known.items() if path and path.exists()}
    if len({fingerprint for _, fingerprint in prints.values()}) > 1:
        where = ", ".join(f"{name}: {path}" for name, (path, _) in prints.items())
        raise ValueError(f"different tokenizers ({where}); build the shards with the run's, or choose another run.dir")


def keep_tokenizer(config: RunConfig, dataset: TokenDataset, run_dir: Path) -> None:
    """Keep the tokenizer with the run, so that generating and exporting need nothing else."""
    source = Path(config.tokenizer.path) if config.tokenizer.path else _of_shards(dataset)
    if source is not None and not (run_dir / "tokenizer").exists():
        load_tokenizer(source).save(run_dir / "tokenizer")


def _of_shards(dataset: TokenDataset) -> Path | None:
    folder = dataset.paths[0].parent / dataset.info.tokenizer if dataset.info else None
    return folder if folder is not None and folder.exists() else None

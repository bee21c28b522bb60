"""The run's data: its shards, or a small built-in text when the recipe names none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.build import TrainTokenizer, build
from data_pipeline.cache import CacheOptions
from data_pipeline.images.dataset import ImageTextDataset
from data_pipeline.images.form import PictureForm
from data_pipeline.images.labels import LabelStream, as_tokenizer
from data_pipeline.images.pairs import PairStream
from data_pipeline.images.problems import Skip, fatal
from data_pipeline.images.stream import ImageTextStream
from data_pipeline.indexing import holds_pictures
from data_pipeline.pack import TokenStream
from data_pipeline.reader import TokenDataset
from data_pipeline.sources.stdlib import tiny_files
from data_pipeline.tokenizer import load_tokenizer
from pretrain.config import RunConfig

Dataset = TokenDataset | ImageTextDataset
OnFirst = Callable[[Callable[[], Any]], Any]  # runs an action on rank 0 alone, while the others wait


def open_datasets(config: RunConfig, on_first: OnFirst) -> list[Dataset]:
    """The training data, source by source. Raises ValueError or FileNotFoundError for shards that cannot be used."""
    if config.data.sources:
        return [_open(config, source.shards) for source in config.data.sources]
    folder = Path(config.run.dir) / "data"
    on_first(lambda: build_tiny_shards(folder, config.tokenizer.path))
    return [_open(config, str(folder / "train-*.tar"))]


def make_stream(
    config: RunConfig, dataset: Dataset, shuffle: bool = True, skipped: Sequence[int] = ()
) -> TokenStream | ImageTextStream | PairStream:
    """Samples of a dataset, as the recipe's model takes them."""
    options: Any = {"seq_len": config.data.seq_len, "seed": config.run.seed, "shuffle": shuffle, "skipped": skipped}
    options["together"] = config.data.shuffle_shards
    if isinstance(dataset, TokenDataset):
        return TokenStream(dataset, **options)
    options["workers"] = config.data.pictures.workers
    if reads_classes(config):
        return LabelStream(dataset, picture_form(config), **options)
    if config.objective.name == "contrastive":
        return PairStream(dataset, picture_form(config), **options)
    return ImageTextStream(dataset, picture_form(config), patches=config.data.patches, **options)


def describe_packing(config: RunConfig, datasets: list[Dataset], ranks: int) -> list[str]:
    """For the log: how even the first steps' rows of pictures are over data ranks, and how full. Nothing is decoded."""
    lines = []
    for dataset in datasets:
        stream = make_stream(config, dataset)
        if isinstance(stream, ImageTextStream):
            cost = stream.cost(0, 20, config.train.global_batch, ranks)
            lines.append(
                f"{dataset.names[0]}: {stream.num_samples:,} rows an epoch, {stream.num_cut} documents cut; "
                f"costliest rank / mean {cost.max_over_mean:.3f}, padding {cost.token_padding:.0%} of tokens and "
                f"{cost.patch_padding:.0%} of patches"
            )
    return lines


def picture_form(config: RunConfig) -> PictureForm:
    """What becomes of a picture: as the model's tower and connector want it."""
    model, pictures = config.model, config.data.pictures
    vision, connector = model.vision, getattr(model, "connector", None)
    learned = vision is not None and vision.positions == "learned"
    rows, columns = vision.grid if learned else (224 // model.patches.size,) * 2
    size = pictures.size or min(rows, columns) * model.patches.size
    most = pictures.max_patches or rows * columns
    if learned and (size // model.patches.size > min(rows, columns) or pictures.resize == "native"):
        raise ValueError(
            f'data.pictures: resize = "{pictures.resize}", size = {size}: model.vision.grid = {[rows, columns]} knows '
            f'{rows} x {columns} places of {model.patches.size} pixels; choose a smaller size, or positions = "rope"'
        )
    return PictureForm(
        patch=model.patches.size,
        image_token=getattr(model, "image_token", 0),
        resize=pictures.resize,
        size=size,
        max_patches=most,
        merge=connector.merge if connector is not None else 1,
        class_slot=vision is not None and vision.class_token,
        queries=connector.queries if connector is not None else 0,
        newline_token=None if pictures.newline < 0 else pictures.newline,
    )


def build_tiny_shards(folder: Path, tokenizer: str = "") -> None:
    """A few hundred KB of Python's own library, for a first run without any data."""
    build(tiny_files(), folder, tokenizer=tokenizer or TrainTokenizer(vocab_size=2048), workers=1, progress=False)


def open_held_out(config: RunConfig) -> Dataset:
    """The held-out documents."""
    return _open(config, config.eval.shards)


def _open(config: RunConfig, shards: str) -> Dataset:
    classes = as_tokenizer(config.model.classes) if reads_classes(config) else None
    cache = CacheOptions(**config.data.cache.model_dump())
    if not holds_pictures(shards, cache):
        if classes is not None:
            raise ValueError(f'{shards} hold text, but objective.name = "classification" needs pictures; name others')
        return TokenDataset(shards, vocab_size=config.model.vocab_size or None, cache=cache)
    if not config.data.patches:
        raise ValueError(f"{shards} hold pictures, but data.patches = 0; set how many patches a sample has")
    if not config.tokenizer.path and classes is None:
        raise ValueError(f"{shards} hold pictures and text, but tokenizer.path is not set; name the text's tokenizer")
    pictures = config.data.pictures
    return ImageTextDataset(
        shards,
        classes or load_tokenizer(config.tokenizer.path),
        placeholder=pictures.placeholder,
        cache=cache,
        image_first=pictures.image_first,
        max_pixels=pictures.max_pixels,
        max_bytes=pictures.max_bytes,
        on_problem=fatal if pictures.broken == "fatal" else Skip(source=shards),
    )


def reads_classes(config: RunConfig) -> bool:
    """Whether captions are names of classes, and not text for a tokenizer."""
    return bool(config.objective.name == "classification")


def with_tokenizer(config: RunConfig) -> RunConfig:
    """The config with the vocabulary size of `tokenizer.path`, where the recipe names one. Raises ValueError when the
    model's vocabulary is too small for it.
    """
    if not config.tokenizer.path:
        return config
    if reads_classes(config):
        raise ValueError(
            f"tokenizer.path = {config.tokenizer.path!r}: captions are names of model.classes, not text; leave it out"
        )
    needed = load_tokenizer(config.tokenizer.path).vocab_size
    if config.model.vocab_size and config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {needed} of tokenizer.path = "
            f"{config.tokenizer.path!r}; raise it, or leave it out to take the tokenizer's"
        )
    return _with_vocab_size(config, config.model.vocab_size or needed)


def with_vocabulary(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with the model's vocabulary size filled in from the shards where it is still open. Raises ValueError
    when the shards were built with another vocabulary than the recipe's tokenizer has.
    """
    if isinstance(dataset, ImageTextDataset):  # the tokenizer's, which the recipe names
        return config
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


def check_tokenizer(config: RunConfig, datasets: list[Dataset], run_dir: Path) -> None:
    """Raises ValueError when the run, its recipe and its shards do not all have the same tokenizer."""
    known = {"tokenizer.path": Path(config.tokenizer.path) if config.tokenizer.path else None}
    known |= {f"the shards {dataset.paths[0].parent}": _of_shards(dataset) for dataset in datasets}
    known["the run"] = run_dir / "tokenizer"
    prints = {name: (path, load_tokenizer(path).fingerprint) for name, path in known.items() if path and path.exists()}
    if len({fingerprint for _, fingerprint in prints.values()}) > 1:
        where = ", ".join(f"{name}: {path}" for name, (path, _) in prints.items())
        raise ValueError(f"different tokenizers ({where}); build the shards with the run's, or choose another run.dir")


def keep_tokenizer(config: RunConfig, datasets: list[Dataset], run_dir: Path) -> None:
    """Keep the tokenizer with the run, so that generating and exporting need nothing else."""
    source = Path(config.tokenizer.path) if config.tokenizer.path else _of_shards(datasets[0])
    if source is not None and not (run_dir / "tokenizer").exists():
        load_tokenizer(source).save(run_dir / "tokenizer")


def _of_shards(dataset: Dataset) -> Path | None:
    if isinstance(dataset, ImageTextDataset) or dataset.info is None:
        return None
    folder = dataset.paths[0].parent / dataset.info.tokenizer
    return folder if folder.exists() else None

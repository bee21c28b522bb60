"""Indexes of many shards, made ahead of time by several processes, for tokens and for pictures alike."""

import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipeline.cache import CacheOptions
from data_pipeline.chunk import start_worker
from data_pipeline.folders import load_infos
from data_pipeline.images.index import SUFFIX as PICTURE_SUFFIX
from data_pipeline.images.index import load_pictures
from data_pipeline.index import INDEX_SUFFIX, load_index
from data_pipeline.places import Shard, find_shards
from data_pipeline.progress import byte_bar
from data_pipeline.shards import token_dtype

MEMBERS = 8  # looked at to tell what a shard holds


@dataclass(frozen=True)
class IndexJob:
    """One shard to index; plain values, for another process."""

    shard: str
    cache: CacheOptions
    vocab_size: int | None
    force: bool


@dataclass(frozen=True)
class Indexed:
    """What came of a shard. made: the index was not there before; error: why there is none."""

    shard: str
    line: str = ""
    made: bool = False
    error: str = ""


def holds_pictures(shards: str | Path | Sequence[str | Path], cache: CacheOptions | None = None) -> bool:
    """Whether the first shard is of pictures and text, not of tokens.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be fetched. ValueError: it is no tar.
    """
    return _holds_pictures(find_shards(shards, cache)[0])


def _holds_pictures(shard: Shard) -> bool:
    if shard.url:  # an index tells without the shard
        if shard.beside(INDEX_SUFFIX).is_file():
            return False
        if shard.beside(PICTURE_SUFFIX).is_file():
            return True
    try:
        with shard.local() as path, tarfile.open(path, "r:") as archive:
            names = [member.name for member in islice(archive, MEMBERS)]
    except tarfile.TarError as error:
        raise ValueError(f"{shard.name}: is no tar that can be read ({error}); build it again") from error
    return bool(names) and not any(name.endswith(".tokens") for name in names)


def index_shards(
    shards: Sequence[str | Path],
    *,
    cache: CacheOptions | None = None,
    vocab_size: int | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Iterator[Indexed]:
    """Make the indexes that shards lack; yields what came of each as it is done, of one that fails too.

    Args:
        shards: folders (their ``*.tar``), paths, URLs and patterns.
        vocab_size: of the tokenizer of token shards without a ``dataset.json``.
        force: make them anew; of shards elsewhere, fetch all files anew.
        workers: processes; default one a core.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    patterns = [f"{path}/*.tar" if Path(path).is_dir() else path for path in shards]
    found = find_shards(patterns, cache)
    jobs = [IndexJob(shard.url or str(shard.path), cache or CacheOptions(), vocab_size, force) for shard in found]
    sizes = {job.shard: 0 if shard.url else shard.path.stat().st_size for job, shard in zip(jobs, found, strict=True)}
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with byte_bar(f"indexing {len(jobs)} shards", sum(sizes.values()), show=progress, keep=False) as advance:
        if workers == 1:
            yield from (index_one(job, advance) for job in jobs)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, start_worker) as pool:
            try:
                for future in as_completed([pool.submit(index_one, job) for job in jobs]):
                    advance(sizes[future.result().shard])
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def index_one(job: IndexJob, advance: Callable[[int], None] = lambda _: None) -> Indexed:
    """Index one shard, of whichever kind it is."""
    shard = find_shards(job.shard, job.cache)[0]
    try:
        if job.force and shard.url:
            shard.forget()
        pictures = _holds_pictures(shard)
        path = shard.beside(PICTURE_SUFFIX if pictures else INDEX_SUFFIX)
        if job.force and not shard.url:
            path.unlink(missing_ok=True)
        made = not path.is_file()
        if pictures:
            index = load_pictures(shard, advance)
            counts = f"{len(index.texts):,} samples, {len(index.images):,} pictures"
            counts += f", {len(index.problems):,} samples that cannot be used" if index.problems else ""
        else:
            tokens = load_index(shard, _dtype(shard, job.vocab_size), advance)
            counts = f"{len(tokens.lengths):,} documents, {int(tokens.lengths.sum()):,} tokens"
    except (ValueError, OSError) as error:
        return Indexed(job.shard, error=" ".join(str(error).split()))
    where = "" if path.parent == shard.path.parent and not shard.url else f" ({path})"
    return Indexed(job.shard, f"{shard.name}: {'indexed' if made else 'has its index'}, {counts}{where}", made)


def _dtype(shard: Shard, vocab_size: int | None) -> str:
    info = load_infos([shard])[shard.path.parent]
    if info is None and vocab_size is None:
        raise ValueError(
            f"{shard.name}: no dataset.json beside it tells the token dtype; give the vocabulary's size (--vocab-size)"
        )
    return info.dtype if info is not None else token_dtype(vocab_size or 0)

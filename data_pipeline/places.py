"""Where shards lie: on a disk of this machine, or elsewhere and in the cache once they are needed."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from braceexpand import braceexpand

from data_pipeline.cache import CacheOptions, Checked, ShardCache
from data_pipeline.paths import expand_paths
from data_pipeline.progress import byte_bar
from data_pipeline.remote import PIPE, SAY_EVERY, Tries, beside, is_remote, list_urls, say

FETCHES = 8  # at once
SIDECARS = (".idx", ".json", ".parquet")  # what a glob also finds beside shards, img2dataset's and ours
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    """One shard. name: as its user knows it, a path or a URL; path: where its bytes lie, or will lie in the cache; url:
    empty for a shard on a disk of this machine.
    """

    name: str
    path: Path
    cache: ShardCache
    url: str = ""

    @contextmanager
    def local(self, index: Checked | None = None) -> Iterator[Path]:
        """The shard's file, which stays within the context: fetched where needed, and compared with its index.

        Raises:
            ValueError: it does not fit its index. FileNotFoundError, OSError: it cannot be fetched.
        """
        if not self.url:
            yield self.path
            return
        with self.cache.held(self.url, self.path, index) as path:
            try:
                yield path
            except ValueError as error:
                if index is None:  # nothing else has told that it came whole
                    path.unlink(missing_ok=True)
                raise ValueError(str(error).replace(str(path), self.name)) from error

    def open(self, index: Checked | None = None) -> IO[bytes]:
        """The shard's file, open to be read."""
        if self.url:
            self.cache.touch(self.path)
            with suppress(FileNotFoundError):
                return self.path.open("rb")
            with self.local(index) as path:
                return path.open("rb")
        return self.path.open("rb")

    def touch(self) -> None:
        """Note that the shard is in use, so that others make room first."""
        if self.url:
            self.cache.touch(self.path)

    def forget(self) -> None:
        """Remove what the cache has of a shard that is elsewhere, and of its folder."""
        self.cache.forget(self.path)

    def beside(self, suffix: str) -> Path:
        """The path of the file that belongs to the shard, fetched where there is one: beside the shard, or in the cache
        where the shard's folder cannot be written or is elsewhere.
        """
        path = self.path.with_name(self.path.name + suffix)
        if self.url:
            if not self.url.startswith(PIPE) and not path.is_file():
                self.cache.fetch_small(beside(self.url, suffix), path)
            return path
        if path.is_file() or os.access(self.path.parent, os.W_OK):
            return path
        kept = self.cache.folder_for(str(self.path.parent.resolve())) / path.name
        with suppress(OSError):  # then it is made again each time
            kept.parent.mkdir(parents=True, exist_ok=True)
        return kept

    def folder_file(self, name: str) -> Path:
        """The path of a file of the shard's folder, fetched where there is one."""
        path = self.path.parent / name
        if self.url and not self.url.startswith(PIPE) and not path.is_file():
            folder = self.url.partition("?")[0] if self.url.startswith("http") else self.url
            self.cache.fetch_small(f"{folder.rpartition('/')[0]}/{name}", path)
        return path


def find_shards(patterns: str | Path | Sequence[str | Path], cache: CacheOptions | None = None) -> list[Shard]:
    """Shards for paths, URLs and commands (``pipe:``): braces are expanded, globs too where the store can list.

    The order of the patterns is kept, each glob is sorted, repeats are dropped. What needs no glob is not asked for
    yet.

    Raises:
        FileNotFoundError: a pattern, or one of its brace members, matches nothing.
    """
    store = ShardCache(cache or CacheOptions())
    found: dict[str, Shard] = {}
    patterns = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if not patterns:
        raise FileNotFoundError("shards: the list of patterns is empty; name at least one file or URL")
    for pattern in patterns:
        name = str(pattern).removeprefix("file://")
        if is_remote(name):
            shards = [Shard(url, store.path(url), store, url) for url in _urls(name, store.options.tries)]
        else:
            path = Path(name) if name != str(pattern) else pattern
            paths = expand_paths([path], what="shards")
            tars = [path for path in paths if not path.name.endswith(SIDECARS)]
            shards = [Shard(str(path), path, store) for path in (tars or paths)]
        found.update({shard.name: found.get(shard.name, shard) for shard in shards})
    return list(found.values())


def _urls(pattern: str, tries: Tries) -> Iterator[str]:
    try:
        members = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"shards {pattern!r}: unbalanced braces; write text-{{000..127}}.tar") from error
    for member in members:
        if member.startswith(PIPE) or not re.search(r"[*\[]", member):
            yield member
            continue
        urls = [url for url in list_urls(member, tries) if not url.endswith(SIDECARS)]
        if not urls:
            raise FileNotFoundError(f"shards {pattern!r}: nothing there matches {member}; check the URL")
        yield from urls


def load_each(
    load: Callable[[Shard, Callable[[int], None]], Result], shards: Sequence[Shard], suffix: str, *, progress: bool
) -> list[Result]:
    """What ``load`` makes of each shard, which is also told whom to tell of bytes read where it scans one.

    Shards on disks come one after the other, behind a bar where some have no file with ``suffix``; others at once.
    """
    bare = [shard for shard in shards if not shard.url and not shard.beside(suffix).is_file()]
    total = sum(shard.path.stat().st_size for shard in bare)
    with byte_bar(f"indexing {len(bare)} shards", total, show=progress and bool(bare), keep=False) as advance:
        if any(shard.url for shard in shards):
            return at_once(lambda shard: load(shard, advance), shards)
        return [load(shard, advance) for shard in shards]


def at_once(work: Callable[[Shard], Result], shards: Sequence[Shard]) -> list[Result]:
    """What ``work`` makes of each shard, several at a time, as its time goes into waiting.

    The first error ends the others. A line is said when many shards take long.
    """
    if len(shards) == 1:
        return [work(shards[0])]
    pool = ThreadPoolExecutor(FETCHES, "shards")
    futures = [pool.submit(work, shard) for shard in shards]
    try:
        _wait(futures, shards)
    except BaseException:
        shards[0].cache.cancelled.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        shards[0].cache.cancelled.clear()
    return [future.result() for future in futures]


def _wait(futures: list[Future], shards: Sequence[Shard]) -> None:
    begun, left = time.monotonic(), set(futures)
    while left:
        done, left = wait(left, SAY_EVERY, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if left:
            passed = time.monotonic() - begun
            say(f"{len(futures) - len(left)} of {len(futures)} shards there after {passed:.0f} s: {shards[0].name} ...")

"""A bounded folder of files that came from elsewhere, shared by the processes of a machine.

CACHE/LAST-PART-OF-URL-HASH/SHARD.tar           whole, checked; least recently used ones make room for others
                            SHARD.tar.idx       and other small files: they stay
      .locks/                                   held while a file is fetched, opened or removed
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from data_pipeline.remote import PIPE, SAY_EVERY, Tries, download, say, shown

PARTIAL = ".partial"
TOUCH_EVERY = 5.0  # seconds: how exact "least recently used" is
SPARE = 1e9  # bytes, or a twentieth of a smaller disk, that the cache leaves free


@dataclass(frozen=True)
class CacheOptions:
    """Where fetched shards lie and how they are fetched.

    dir: the folder. gb: 1e9 bytes that its shards may take; less where the disk has less. retries: after a failed
    attempt. timeout: seconds without a byte that end an attempt.
    """

    dir: str = "~/.cache/pretrain/shards"
    gb: float = 100.0
    retries: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.dir or self.gb <= 0 or self.retries < 0 or self.timeout <= 0:
            raise ValueError(f"{self}: needs a folder, gb and timeout above 0, retries of 0 or more")

    @property
    def tries(self) -> Tries:
        return Tries(self.retries, self.timeout)


class Checked(Protocol):
    """What knows how a shard must look: its index."""

    def check(self, shard: Path) -> None:
        """Raise ValueError for a file that it does not fit, in a few short reads."""

    def verify(self, shard: Path) -> None:
        """Raise ValueError for another file than it was made for; may read it whole."""


class ShardCache:
    """Files of URLs, fetched when they are asked for. Safe for threads and for several processes."""

    def __init__(self, options: CacheOptions) -> None:
        self.options, self.folder = options, Path(options.dir).expanduser()
        self.cancelled = threading.Event()  # set: whatever is being fetched is given up
        self._touched: dict[Path, float] = {}

    def folder_for(self, name: str) -> Path:
        """Where files that belong together lie, such as those of a folder elsewhere."""
        readable = re.sub(r"[^\w.-]+", "-", PIPE if name.startswith(PIPE) else shown(name)).strip("-.")[-40:]
        return self.folder / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def path(self, url: str) -> Path:
        """Where the shard of a URL or command lies, once fetched. Shards of one folder share a folder."""
        if url.startswith(PIPE):
            return self.folder_for(url) / "pipe.tar"
        folder, _, last = url.partition("?")[0].rpartition("/") if url.startswith("http") else url.rpartition("/")
        name = re.sub(r"[^\w.-]+", "-", PurePosixPath(last).name).strip("-.")
        if name != last or (url.startswith("http") and urlsplit(url).query):
            name = f"{name.removesuffix('.tar')}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        return self.folder_for(folder) / (name if name.endswith(".tar") else f"{name}.tar")

    @contextmanager
    def held(self, url: str, path: Path, checked: Checked | None) -> Iterator[Path]:
        """The shard of a URL, which cannot be removed within the context: fetched where it is not there.

        Raises:
            ValueError: what was fetched, twice, is not what ``checked`` was made for, or does not fit the cache.
            FileNotFoundError, OSError: as ``remote.download``.
        """
        with self._locked(path, f"for another process that fetches {shown(url)}"):
            if path.is_file() and checked is not None:
                try:
                    checked.check(path)
                except ValueError as error:
                    say(f"{error}; fetching it again")
                    path.unlink()
            if not path.is_file():
                self._fetch(url, path, checked)
            self.touch(path)
            yield path

    def fetch_small(self, url: str, path: Path) -> bool:
        """Fetch a file that lies beside shards, where there is one. Returns whether there is."""
        with self._locked(path, f"for another process that fetches {shown(url)}"):
            try:
                if not path.is_file():
                    self._fetch(url, path, None)
            except FileNotFoundError:
                return False
        return True

    def forget(self, path: Path) -> None:
        """Remove a shard and the files that belong to it, so that they are fetched anew."""
        with self._locked(path, "for another process that fetches it"):
            for name in (path.name, f"{path.name}.*", "dataset.json"):
                for file in path.parent.glob(name):
                    file.unlink(missing_ok=True)

    def touch(self, path: Path) -> None:
        """Note that a shard is in use."""
        now = time.monotonic()
        if now - self._touched.get(path, -TOUCH_EVERY) >= TOUCH_EVERY:
            self._touched[path] = now
            with suppress(FileNotFoundError):
                os.utime(path)

    def _fetch(self, url: str, path: Path, checked: Checked | None) -> None:
        folder = self._made(".partial")
        for old in folder.glob(f"{self._key(path)}.*{PARTIAL}"):  # of a process that was killed
            old.unlink(missing_ok=True)
        for repeated in (False, True):
            handle, name = tempfile.mkstemp(PARTIAL, f"{self._key(path)}.", folder)
            os.close(handle)
            partial = Path(name)
            try:
                self._download(url, partial, bounded=path.suffix == ".tar")
                if checked is not None:
                    checked.verify(partial)
                partial.chmod(0o644)
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(path)
                return
            except ValueError as error:
                why = str(error).replace(f"{partial}: ", "")
                if checked is None or shown(url) in why:
                    raise
                if repeated:
                    raise ValueError(
                        f"{shown(url)}: fetched twice, and not what its index was made for ({why}); restore it there, "
                        f"or remove {path.parent} to take all of it anew"
                    ) from error
                say(f"{shown(url)}: not what its index was made for ({why}); fetching it once more")
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, url: str, partial: Path, *, bounded: bool) -> None:
        def make_room(num_bytes: int) -> None:
            while bounded and not self._make_room(num_bytes, partial):
                if self.cancelled.wait(0.1):
                    raise OSError("cancelled")

        download(url, partial, self.options.tries, on_size=make_room, cancelled=self.cancelled)
        if bounded:
            self._make_room(0, partial)  # for what came without a size

    def _make_room(self, num_bytes: int, partial: Path) -> bool:
        """Remove the least recently used shards and reserve room for a file of ``num_bytes``. Returns whether there is
        room; else others are being fetched, and have to be waited for.
        """
        with self._locked(self.folder / "room", "for another process that makes room in the cache"):
            files = [(path, stat) for path, stat in _files(self.folder) if path != partial or not num_bytes]
            total = sum(stat.st_size for _, stat in files)
            taken = sum(stat.st_blocks * 512 for _, stat in files)
            disk = shutil.disk_usage(self.folder)
            limit = min(self.options.gb * 1e9, taken + disk.free - min(SPARE, disk.total / 20))
            if num_bytes > limit:
                raise ValueError(
                    f"{num_bytes / 1e9:.3f} GB do not fit the cache {self.folder} of {max(limit, 0) / 1e9:.3f} GB "
                    f"(data.cache.gb = {self.options.gb:g}, free on the disk: {disk.free / 1e9:.1f} GB); raise it, or "
                    f"choose another data.cache.dir"
                )
            for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
                if total + num_bytes <= limit:
                    break
                if self._remove(path):
                    total -= stat.st_size
            fits = total + num_bytes <= limit
            if fits and num_bytes:
                os.truncate(partial, num_bytes)  # others see that it is taken; written over from the start
            return fits

    def _remove(self, path: Path) -> bool:
        """Remove a shard unless somebody fetches or opens it right now. Who has mapped it keeps it."""
        key = path.name.rsplit(".", 2)[0] if path.suffix == PARTIAL else self._key(path)
        with self._lock_file(key).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink(missing_ok=True)
        return True

    def _key(self, path: Path) -> str:
        return "-".join(path.relative_to(self.folder).parts)

    def _lock_file(self, key: str) -> Path:
        return self._made(".locks") / f"{key}.lock"

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache.dir = {self.options.dir!r}: cannot be used ({error}); choose another"
            ) from error
        return folder

    @contextmanager
    def _locked(self, path: Path, what: str) -> Iterator[None]:
        begun = said = time.monotonic()
        with self._lock_file(self._key(path)).open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    now = time.monotonic()
                    if self.cancelled.is_set():
                        raise OSError(f"{path.name}: given up, as another file failed") from None
                    if now - said >= SAY_EVERY:
                        said = now
                        say(f"waiting {what}, for {now - begun:.0f} s")
                    time.sleep(min(0.2, 0.002 + (now - begun) / 10))
            yield


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Shards, whole or not, but none that goes away meanwhile."""
    found = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):
            if path.suffix in (".tar", PARTIAL):
                found.append((path, path.stat()))
    return found

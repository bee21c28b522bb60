"""Bytes of shards that are elsewhere: http(s), what fsspec opens (s3, gs, hf, memory, ...), what a command writes.

A download is tried again with growing pauses, says how far it is while one waits for it, and ends in one line that
names the source: never in silence.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import InvalidURL
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

import fsspec

PIPE = "pipe:"
CHUNK = 1 << 20  # bytes, at most, between two looks at how far it is
BLOCK = 16 << 20  # bytes of one request to an object store
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds: after the first failure, doubled after each further one; at most
SAY_EVERY = 10.0  # seconds of waiting between two lines about it
SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1"}
ABSENT = (403, 404, 410)  # a bucket that cannot be listed answers 403 for what it does not have
TRANSIENT = (408, 425, 429)  # and all from 500 on
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError, InvalidURL)


@dataclass(frozen=True)
class Tries:
    """How a source is asked: ``retries`` after the first attempt; ``timeout`` seconds without a byte end one."""

    retries: int = 5
    timeout: float = 60.0


@dataclass(frozen=True)
class Stream:
    """An open source. size: bytes to come, None where it does not say; read: the next ones, empty at the end."""

    size: int | None
    read: Callable[[], bytes]
    close: Callable[[], None]


def is_remote(pattern: str | Path) -> bool:
    """Whether a pattern names a URL or a command, not a path."""
    return str(pattern).startswith(PIPE) or "://" in str(pattern)


def shown(url: str) -> str:
    """The URL as messages have it: without user, password, signature."""
    if url.startswith(PIPE):
        return url
    return re.sub(r"//[^/@]*@", "//", beside(url, "", keep_query=False))


def beside(url: str, suffix: str, *, keep_query: bool = True) -> str:
    """The URL of the file whose path is longer by ``suffix``; keys of other stores than http have no query."""
    if not url.startswith(("http://", "https://")):
        return url + suffix
    parts = urlsplit(url)
    query = parts.query if keep_query else ""
    return urlunsplit((parts.scheme, parts.netloc, parts.path + suffix, query, ""))


def list_urls(pattern: str, tries: Tries) -> list[str]:
    """Sorted URLs of the files that a pattern with * or [ matches, where the store can list. Raises as `download`."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "listing"
        download(pattern, listing, tries, opener=_open_listing)
        return listing.read_text().splitlines()


def _open_listing(pattern: str, _: float) -> Stream:
    store, path = _store(pattern)
    store.invalidate_cache()
    found = store.glob(path, detail=True)
    files = [name for name, info in found.items() if info["type"] == "file" and not name.endswith("/")]
    parts = iter(["\n".join(sorted(store.unstrip_protocol(name) for name in files)).encode(), b""])
    return Stream(None, lambda: next(parts), lambda: None)


def open_source(url: str, timeout: float) -> Stream:
    """Begin to read. ``timeout``: seconds that a server may take for an answer."""
    if url.startswith(PIPE):
        return _open_pipe(url[len(PIPE) :])
    if url.startswith(("http://", "https://")):
        return _open_http(url, timeout)
    store, path = _store(url)
    size = store.info(path)["size"]
    file = store.open(path, "rb", block_size=BLOCK)
    return Stream(size, lambda: file.read(CHUNK), file.close)


def _store(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'pretrain-stack[remote]'") from error


def _open_http(url: str, timeout: float) -> Stream:
    # "identity": else a server may pack the bytes, and its Content-Length counts packed ones.
    request = urllib.request.Request(url, headers={"User-Agent": "pretrain-stack", "Accept-Encoding": "identity"})
    response = urllib.request.urlopen(request, timeout=timeout)
    length = response.headers.get("Content-Length")
    return Stream(None if length is None else int(length), lambda: response.read1(CHUNK), response.close)


def _open_pipe(command: str) -> Stream:
    words = shlex.split(command)
    if not words or SHELL & set(words):
        raise ValueError("a command and its arguments, run without a shell; put pipes and the like into a script")
    said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the stream)
    # A session of its own: what the command has started ends with it.
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
    )
    output = process.stdout
    assert output is not None

    def read() -> bytes:
        data = output.read1(CHUNK)  # type: ignore[attr-defined]
        if not data and process.wait():
            said.seek(max(0, said.seek(0, os.SEEK_END) - 1000))
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"exit status {process.returncode}: {last[0] if last else 'it said nothing'}")
        return data

    def close() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return Stream(None, read, close)


def is_absent(error: BaseException) -> bool:
    """Whether a source says that it does not have a file."""
    return isinstance(error, FileNotFoundError | PermissionError) or (
        isinstance(error, HTTPError) and error.code in ABSENT
    )


def _is_final(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code < 500 and error.code not in TRANSIENT
    return isinstance(error, FINAL) or "Credential" in type(error).__name__


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, HTTPError) or not text else f"{type(error).__name__}: {text}"


@dataclass
class Attempt:
    """One reading of a source from beginning to end into a file, in a thread that can be given up."""

    url: str
    file: IO[bytes]
    opener: Callable[[str, float], Stream]
    on_size: Callable[[int], None]  # called with the size before anything is written, where the source tells it
    size: int | None = None
    done: int = 0
    moved: float = field(default_factory=time.monotonic)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    stream: Stream | None = None
    waits: bool = False  # for room, not for the source
    given_up: bool = False

    def start(self, timeout: float) -> None:
        threading.Thread(target=self._run, args=(timeout,), name="fetch", daemon=True).start()

    def _run(self, timeout: float) -> None:
        try:
            self.stream = self.opener(self.url, timeout)
            try:
                self._copy(self.stream)
            finally:
                self.stream.close()
        except BaseException as error:
            self.error = error
        self.ended.set()

    def _copy(self, stream: Stream) -> None:
        self.size, self.waits = stream.size, True
        if stream.size is not None:
            self.on_size(stream.size)  # may wait for room
        self.waits, self.moved = False, time.monotonic()
        while (data := stream.read()) and not self.given_up:
            self.file.write(data)
            self.done, self.moved = self.done + len(data), time.monotonic()
        if self.size not in (None, self.done):
            raise ConnectionError(f"ended after {self.done} of {self.size} bytes")

    def give_up(self) -> None:
        """Leave the thread to itself; it ends when its source does."""
        self.given_up = True
        if self.stream is not None and self.url.startswith(PIPE):
            self.stream.close()

    def __str__(self) -> str:
        return f"{self.done / 1e6:.1f}" + (f" of {self.size / 1e6:.1f} MB" if self.size else " MB")


def download(
    url: str,
    path: Path,
    tries: Tries,
    *,
    on_size: Callable[[int], None] = lambda _: None,
    cancelled: threading.Event | None = None,
    opener: Callable[[str, float], Stream] = open_source,
) -> None:
    """Write what a source has to a file.

    on_size: called with the number of bytes before they come, where the source tells it; may raise to refuse them.

    Raises:
        FileNotFoundError: the source does not have it. ValueError: the URL or command is wrong. ConnectionError: no
        attempt succeeded. OSError: ``cancelled`` was set.
    """
    cancelled = cancelled or threading.Event()
    for number in range(1, tries.retries + 2):
        which = f"attempt {number} of {tries.retries + 1}"
        try:
            with path.open("wb") as file:
                _attempt(Attempt(url, file, opener, on_size), tries.timeout, which, cancelled)
                file.flush()
                os.fsync(file.fileno())  # renamed later: whole or absent, also when the machine fails
            return
        except Exception as error:  # stores raise classes of their own
            if cancelled.is_set():
                raise OSError(f"{shown(url)}: given up, as another file failed") from error
            if is_absent(error):
                raise FileNotFoundError(f"{shown(url)}: not there, or not allowed ({_reason(error)})") from error
            if _is_final(error):
                raise ValueError(f"{shown(url)}: cannot be read ({_reason(error)})") from error
            if number > tries.retries:
                raise ConnectionError(
                    f"{shown(url)}: {number} attempts failed, the last one: {_reason(error)}"
                ) from error
            # Jitter: ranks that failed together do not come back together.
            pause = min(PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
            say(f"{shown(url)}: {which} failed ({_reason(error)}); again in {pause:.1f} s")
            cancelled.wait(pause)


def _attempt(attempt: Attempt, timeout: float, which: str, cancelled: threading.Event) -> None:
    begun = said = time.monotonic()
    attempt.start(timeout)
    try:
        while not attempt.ended.wait(0.25):
            now = time.monotonic()
            if cancelled.is_set():
                raise OSError("cancelled")
            if now - attempt.moved > timeout and not attempt.waits:
                raise TimeoutError(f"no byte for {timeout:g} s, after {attempt}")
            if now - said >= SAY_EVERY:
                said = now
                doing = "waiting for room in the cache for" if attempt.waits else "fetching"
                say(f"{doing} {shown(attempt.url)}: {attempt} after {now - begun:.0f} s, {which}")
    finally:
        attempt.give_up()
    if attempt.error is not None:
        raise attempt.error


def say(line: str) -> None:
    """A line for whoever waits."""
    print(line, file=sys.stderr, flush=True)

"""The index beside an image-text shard: where pictures and texts lie, and how large the pictures are.

A sample is the members with one key, up to the first dot of the name as WebDataset has it: ``KEY.jpg`` (or .jpeg .png
.webp .gif), or ``KEY.0.jpg KEY.1.jpg ...``, and ``KEY.txt`` or ``KEY.json``. ``SHARD.tar.images.idx`` is a safetensors
file, made once by reading the tar's headers and the pictures' headers; nothing is decoded or extracted.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from data_pipeline.images.decode import PictureError, picture_size
from data_pipeline.index import BLOCK, MEMBERS_AT_ONCE, check_end
from data_pipeline.paths import write_atomic
from data_pipeline.places import Shard

FORMAT_VERSION = 1
SUFFIX = ".images.idx"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
TEXT, JSON = 1, 2  # kinds of caption
ARRAYS = {
    "texts": (np.int64, 2),
    "kinds": (np.uint8, 1),
    "labels": (np.int64, 1),
    "first": (np.int64, 1),
    "images": (np.int64, 2),
    "keys": (np.uint8, 2),
}
MAX_TEXT = 16_000_000  # bytes of a caption, or of the json that it stands in
ENDS = 16 * 1024  # bytes, at each end of a shard


@dataclass(frozen=True)
class PictureIndex:
    """Usable samples of one shard: n of them with m pictures together."""

    texts: np.ndarray  # int64 [n, 2]: bytes from the start of the tar, bytes
    kinds: np.ndarray  # uint8 [n]: TEXT or JSON
    labels: np.ndarray  # int64 [n]: "label" of the json, -1 where it has none
    first: np.ndarray  # int64 [n + 1]: pictures of sample i are first[i] to first[i + 1] - 1
    images: np.ndarray  # int64 [m, 4]: bytes from the start of the tar, bytes, height, width as seen
    keys: np.ndarray  # uint8 [n, longest]: UTF-8, padded with zeros
    shard_size: int
    ends: str  # digest of the shard's first and last blocks
    problems: list[tuple[str, str]] = field(default_factory=list)  # key and reason of what cannot be used

    def key(self, sample: int) -> str:
        return self.keys[sample].tobytes().rstrip(b"\0").decode(errors="replace")

    def save(self, path: Path) -> None:
        facts = {"format_version": FORMAT_VERSION, "shard_size": self.shard_size, "ends": self.ends}
        blob = json.dumps(facts | {"problems": self.problems}, sort_keys=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        write_atomic(path, save_safetensors(arrays, metadata={"shard": blob}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an index. Raises ValueError when the file is not one."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["shard"])
                if facts["format_version"] > FORMAT_VERSION:
                    raise ValueError("written by a newer version")
                arrays = {name: file.get_tensor(name) for name in ARRAYS}
            problems = [(str(key), str(why)) for key, why in facts["problems"]]
            index = cls(**arrays, shard_size=facts["shard_size"], ends=facts["ends"], problems=problems)
            index._check_arrays()
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an image index ({error}); remove it and it is built again") from error
        return index

    def _check_arrays(self) -> None:
        for name, (dtype, dims) in ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != dims:
                raise ValueError(f"array {name} is {array.dtype} {list(array.shape)}")
        if self.texts.shape[1:] != (2,) or self.images.shape[1:] != (4,):
            raise ValueError("texts or images of another width")
        if not len(self.texts) == len(self.kinds) == len(self.labels) == len(self.keys) == len(self.first) - 1:
            raise ValueError("arrays of different lengths")
        if self.first[0] != 0 or self.first[-1] != len(self.images) or (np.diff(self.first) < 0).any():
            raise ValueError("pictures out of order")

    def check(self, shard: Path) -> None:
        """Refuse an index that was not made for this file: its size, its ends, and members outside it."""
        size = shard.stat().st_size
        cure = f"restore the shard, or remove {shard.name}.*.idx to have them built again"
        if size != self.shard_size:
            raise ValueError(f"{shard}: {size} bytes, its index was made for {self.shard_size}; {cure}")
        if digest_ends(shard) != self.ends:
            raise ValueError(f"{shard}: its index was made for another file of the same size; {cure}")
        self.check_places(shard, cure)

    def verify(self, shard: Path) -> None:
        """Refuse an index that was not made for this file, as far as its size and ends tell."""
        size = shard.stat().st_size
        if size != self.shard_size or digest_ends(shard) != self.ends:
            raise ValueError(f"{size} bytes, not the {self.shard_size} that begin and end as they did")
        self.check(shard)

    def check_places(self, shard: Path | str, cure: str) -> None:
        """Refuse an index whose members cannot lie in any tar of its size."""
        for members in (self.texts, self.images):
            begin, length = members[:, 0], members[:, 1]
            outside = (begin < BLOCK) | (begin % BLOCK != 0) | (length < 0) | (length > self.shard_size - begin)
            if outside.any():
                raise ValueError(f"{shard}: its index disagrees with it: a member lies outside the tar; {cure}")


@dataclass
class _Found:
    """Members of one key while a tar is read."""

    pictures: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None
    label: int = -1
    problem: str = ""


def scan_pictures(shard: Path, advance: Callable[[int], None] = lambda _: None) -> PictureIndex:
    """The index of a shard, by reading its headers from end to end; ``advance`` is told of bytes done.

    Raises:
        ValueError: not a whole tar, a member with an absolute name or with ``..`` in it, no sample at all.
    """
    samples: dict[str, _Found] = {}
    done = 0
    with shard.open("rb") as file:
        check_end(shard, file)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing but file)
            for number, member in enumerate(archive, 1):
                if number % MEMBERS_AT_ONCE == 0:
                    advance(member.offset - done)
                    done = member.offset
                _check_name(shard, member.name)
                if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                    _add(samples, member, archive)
        except tarfile.TarError as error:
            raise ValueError(f"{shard}: truncated or not a tar ({error}); restore it or build it again") from error
    advance(shard.stat().st_size - done)
    if not samples:
        raise ValueError(f"{shard}: holds no sample: no picture ({', '.join(PICTURES)}), .txt or .json member")
    return _make_index(samples, shard)


def digest_ends(shard: Path) -> str:
    """Tells a file from another of its size in two short reads: tar headers hold times."""
    with shard.open("rb") as file:
        head = file.read(ENDS)
        file.seek(max(0, shard.stat().st_size - ENDS))
        return hashlib.sha256(head + file.read()).hexdigest()


def _check_name(shard: Path, name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{shard}: member {name!r}: absolute names and '..' are refused; make the tar again")


def _add(samples: dict[str, _Found], member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    number, _, kind = extension.lower().rpartition(".")
    if kind not in (*PICTURES, "txt", "json"):
        return
    found = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Found())
    where = (member.offset_data, member.size)
    try:
        if kind in PICTURES:
            _add_picture(found, number, where, archive, member)
        elif number:
            raise PictureError(f"member .{extension}: not .{kind}")
        elif kind == "txt":
            found.text = where
        else:
            _add_json(found, where, archive, member)
    except PictureError as error:
        found.problem = found.problem or str(error)


def _add_picture(
    found: _Found, number: str, where: tuple[int, int], archive: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    if number and not (number.isascii() and number.isdigit()):
        raise PictureError(f"picture numbered {number!r}")
    place = int(number) if number else -1
    if place in found.pictures:
        raise PictureError(f"two pictures with the number {number or 'none'}")
    payload = archive.extractfile(member)
    assert payload is not None
    found.pictures[place] = (*where, *picture_size(payload))


def _add_json(found: _Found, where: tuple[int, int], archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    payload = archive.extractfile(member)
    assert payload is not None
    about = read_json(payload.read(MAX_TEXT + 1))
    if caption_of(about) is not None:
        found.json = where
    label = about.get("label")
    found.label = label if type(label) is int and 0 <= label < 1 << 31 else -1


def read_json(blob: bytes) -> dict[str, Any]:
    """A json member. Raises PictureError when it is none, or too large."""
    if len(blob) > MAX_TEXT:
        raise PictureError(f"json of more than {MAX_TEXT} bytes")
    try:
        about = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise PictureError(f"json: {error}") from error
    if not isinstance(about, dict):
        raise PictureError(f"json: holds {type(about).__name__}, not a table")
    return about


def caption_of(about: dict[str, Any]) -> str | None:
    """The caption that a json holds, under "caption" or "text"."""
    texts = [about.get(name) for name in ("caption", "text")]
    return next((text for text in texts if isinstance(text, str)), None)


def _make_index(samples: dict[str, _Found], shard: Path) -> PictureIndex:
    problems, kept = [], {}
    for key, found in samples.items():
        where = found.text or found.json
        why = found.problem or ("" if where else "no caption: neither .txt nor a json with 'caption' or 'text'")
        if why or where is None:
            problems.append((key.encode(errors="replace").decode(), why))
        else:
            kept[key] = (found, where, TEXT if found.text else JSON)
    keys = [key.encode(errors="surrogateescape") for key in kept]
    width = max([len(key) for key in keys], default=0) or 1
    images = [picture for found, _, _ in kept.values() for _, picture in sorted(found.pictures.items())]
    counts = [len(found.pictures) for found, _, _ in kept.values()]
    return PictureIndex(
        texts=np.array([where for _, where, _ in kept.values()], np.int64).reshape(-1, 2),
        kinds=np.array([kind for _, _, kind in kept.values()], np.uint8),
        labels=np.array([found.label for found, _, _ in kept.values()], np.int64),
        first=np.cumsum([0, *counts], dtype=np.int64),
        images=np.array(images, np.int64).reshape(-1, 4),
        keys=np.frombuffer(b"".join(key.ljust(width, b"\0") for key in keys), np.uint8).reshape(-1, width),
        shard_size=shard.stat().st_size,
        ends=digest_ends(shard),
        problems=problems,
    )


def index_path(shard: Path) -> Path:
    """Where the image index of a shard lies."""
    return shard.with_name(shard.name + SUFFIX)


def load_pictures(shard: Shard, advance: Callable[[int], None] = lambda _: None) -> PictureIndex:
    """The checked index of a shard; where there is none it is made, and kept where it is looked for next time. Of a
    shard elsewhere, that fits its index is seen when it is fetched.
    """
    path = shard.beside(SUFFIX)
    if path.is_file():
        index = PictureIndex.load(path)
        if shard.url:
            index.check_places(shard.name, f"index it again there, and remove {path}")
        else:
            index.check(shard.path)
        return index
    with shard.local() as file:
        index = scan_pictures(file, advance)
        if os.access(path.parent, os.W_OK):
            index.save(path)
    return index

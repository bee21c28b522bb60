"""The manifest of a checkpoint: what is in it, and how each file must look for it to be whole.

    step-00001000/
        model/rank-00000.safetensors ...   optimizer/rank-00000.safetensors ...   state.json   manifest.json

It is written last, so a folder with a sound manifest was once complete. Files carry size and CRC-32: any one
flipped bit and any burst of up to 32 bits is found for certain, other damage but for one case in 4 billion;
zlib's runs at several GB/s, faster than disks, and comes with Python.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints.collective import CheckpointError

FORMAT_VERSION = 2  # of manifests with a lineage; without one they stay as version 1 was
MANIFEST, STATE = "manifest.json", "state.json"
PARTS = ("model", "optimizer")
Progress = Callable[[int], None]  # called with the number of bytes just read
PIECE = 1 << 20  # bytes read or written at once: small enough to stay in cache between checksum and copy
FILE_NAME = re.compile(rf"(?:{'|'.join(PARTS)})/[\w-]+\.safetensors|{re.escape(STATE)}")


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor, however many files its pieces lie in."""

    shape: list[int]
    dtype: str  # as torch prints it, without "torch."


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    crc32: str  # 8 hexadecimal digits


@dataclass(frozen=True)
class Origin:
    """A checkpoint that this one was derived from, and how."""

    operation: str
    arguments: dict[str, Any]
    path: str  # of the checkpoint, as it was given
    step: int
    manifest: str  # its manifest's checksum, 8 hexadecimal digits

    def __str__(self) -> str:
        arguments = " ".join(f"{key}={json.dumps(value)}" for key, value in self.arguments.items())
        return f"{self.operation} of {self.path} (manifest {self.manifest}): {arguments}"


@dataclass(frozen=True)
class Manifest:
    step: int
    created: str  # UTC, ISO 8601
    tensors: dict[str, dict[str, TensorEntry]]  # part -> name -> entry
    ties: dict[str, str]  # model tensor that is not stored -> the stored one that it is
    files: dict[str, FileEntry]  # path inside the checkpoint -> entry; the manifest itself is not among them
    lineage: tuple[Origin, ...] = ()  # oldest first; empty for a model that was trained from initial weights

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def digest(self) -> str:
        """The checksum that the file carries, 8 hexadecimal digits."""
        return _digest(_text(self._body()))

    def encode(self) -> bytes:
        return _text(self._body() | {"crc32": self.digest})

    def _body(self) -> dict[str, Any]:
        body = {"format_version": FORMAT_VERSION, **asdict(self)}
        if not self.lineage:  # as it was written before there was one
            del body["lineage"]
            body["format_version"] = 1
        return body

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks `folder/manifest.json` itself, not the files that it names.

        Raises FileNotFoundError without folder or manifest, CheckpointError for a damaged or newer manifest.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"no checkpoint at {folder}: see `pretrain checkpoint list`")
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST}: not a whole checkpoint; use another one or remove the folder"
            ) from None
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: bytes, path: str) -> "Manifest":
        """The content of a manifest's file; `path` is what errors call it."""
        try:
            body = json.loads(raw)
            version = body["format_version"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged: use another checkpoint") from None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version}, this program reads up to {FORMAT_VERSION}: "
                "upgrade pretrain-stack"
            )
        try:
            manifest = cls(
                step=body["step"],
                created=body["created"],
                tensors={
                    part: {name: TensorEntry(**entry) for name, entry in body["tensors"][part].items()}
                    for part in PARTS
                },
                ties=body["ties"],
                files={name: FileEntry(**entry) for name, entry in body["files"].items()},
                lineage=tuple(Origin(**entry) for entry in body.get("lineage", ())),
            )
            sound = manifest.encode() == raw  # also compares the checksum
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound or not all(FILE_NAME.fullmatch(name) for name in manifest.files):
            raise CheckpointError(f"{path} is damaged (its checksum does not match): use another checkpoint")
        return manifest

    def size_problems(self, folder: Path) -> list[str]:
        """Files that are missing or have another size; reads no content."""
        problems = []
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif (size := path.stat().st_size) != entry.bytes:
                kind = "truncated" if size < entry.bytes else "too long"
                problems.append(f"{path} is {kind}: {size} bytes, should be {entry.bytes}")
        return problems

    def quick_problems(self, folder: Path) -> list[str]:
        """Those of sizes, and damage to the state, which is small."""
        problems = self.size_problems(folder)
        if not problems and STATE in self.files and checksum(folder / STATE) != self.files[STATE].crc32:
            problems = [f"{folder / STATE} is damaged"]
        return problems

    def content_problems(self, folder: Path, progress: Progress | None = None) -> list[str]:
        """Files whose bytes changed, and files that do not belong here; reads everything.

        `progress` is called with the number of bytes just read.
        """
        problems = []
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                continue
            if (found := checksum(path, progress)) != entry.crc32:
                problems.append(f"{path} is damaged: CRC-32 {found}, should be {entry.crc32}")
        known = {*self.files, MANIFEST}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in known and not (path.is_dir() and not path.is_symlink() and name in PARTS):
                problems.append(f"{path} does not belong to the checkpoint")
        return problems


def checksum(path: Path, progress: Progress | None = None) -> str:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
            if progress is not None:
                progress(len(piece))
    return f"{crc:08x}"


def write_durably(path: Path, content: bytes) -> FileEntry:
    """Writes and fsyncs a small file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    return FileEntry(len(content), _digest(content))


def write_all(handle: int, content: bytes | memoryview) -> None:
    """The system may take less than it is given, at signals and where the disk is nearly full."""
    written = os.write(handle, content)
    while written < len(content):
        written += os.write(handle, content[written:])


def fsync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a power cut; that of the files does not keep names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _digest(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"

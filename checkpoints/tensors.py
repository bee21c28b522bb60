"""Safetensors files read and written one tensor at a time, without ever holding a model.

Reading understands what our checkpoints hold (a tensor in pieces over several files, each piece's offset in the
header, as `torch.distributed.checkpoint` writes them) and what Hugging Face's folders hold. Headers alone are read
first. Format: https://github.com/huggingface/safetensors
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from checkpoints.manifest import Manifest, fsync
from checkpoints.shards import DTYPES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
PIECE = 4 << 20  # bytes written or compared at once


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that lies in one run of bytes of one file."""

    path: Path
    start: int  # byte in the file
    offsets: tuple[int, ...]  # of the box in the tensor
    shape: tuple[int, ...]


class TensorFiles:
    """Tensors by name, over any number of safetensors files; `read` gives one of them whole."""

    def __init__(self, paths: list[Path], where: Path) -> None:
        """Reads the headers of `paths`. `where` is named in errors. Raises ValueError for a damaged file."""
        self.where = where
        self.infos: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[Piece]] = {}
        for path in paths:
            self._add_file(path)
        for name, pieces in self._pieces.items():
            ends = zip(*([o + s for o, s in zip(p.offsets, p.shape, strict=True)] for p in pieces), strict=True)
            shape = tuple(max(end) for end in ends)
            self.infos[name] = TensorInfo(shape, self.infos[name].dtype)
            if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
                raise ValueError(f"{where}: tensor '{name}' is not covered by its pieces once: a file is missing")

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own. Raises KeyError for an unknown name."""
        info = self.infos[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        for piece in self._pieces[name]:
            box = out
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
                box = box.narrow(dim, offset, size)
            if box.is_contiguous():
                _read_into(piece, box)
            else:
                part = torch.empty(piece.shape, dtype=info.dtype)
                _read_into(piece, part)
                box.copy_(part)
        return out

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether `tensor` is the one called `name`, bit for bit."""
        info, pieces = self.infos[name], self._pieces[name]
        if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
            return False
        if len(pieces) > 1:
            return torch.equal(as_bytes(self.read(name)), as_bytes(tensor))
        start = pieces[0].start
        for part in byte_pieces(tensor):
            found = torch.empty_like(part)
            _read_bytes(pieces[0].path, start, found)
            if not torch.equal(_wide(found), _wide(part)):
                return False
            start += part.numel()
        return True

    def _add_file(self, path: Path) -> None:
        header, data_start = read_header(path)
        about = header.pop("__metadata__", {})
        offsets = json.loads(about.get("DCP_SHARDING_INFO", "{}"))
        for name, entry in header.items():
            if entry["dtype"] not in TORCH_DTYPES:
                raise ValueError(f"{path}: tensor '{name}' has the unknown type {entry['dtype']}")
            shape = tuple(entry["shape"])
            at = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
            if name in self._pieces and name not in offsets:
                raise ValueError(f"{path}: tensor '{name}' is in another file of the folder too")
            start = data_start + entry["data_offsets"][0]
            self.infos[name] = TensorInfo(shape, TORCH_DTYPES[entry["dtype"]])
            self._pieces.setdefault(name, []).append(Piece(path, start, at, shape))


def open_checkpoint(folder: Path, part: str = "model") -> TensorFiles:
    """The tensors of one of our checkpoints, of its model or "optimizer"; tied names are left out, as in its files.

    Raises FileNotFoundError or ValueError where the checkpoint is not whole (contents are not read for this).
    """
    manifest = Manifest.read(folder)
    if problems := manifest.size_problems(folder):
        raise ValueError(f"checkpoint {folder} is not whole: {problems[0]}; use another step")
    paths = [folder / name for name in manifest.files if name.startswith(f"{part}/")]
    return TensorFiles(paths, folder)


def open_hf(folder: Path) -> TensorFiles:
    """The tensors of a Hugging Face folder: those its index names, or its single file's.

    Raises FileNotFoundError or ValueError for what is missing, damaged, or only there as pickles.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            strays = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{folder / INDEX} is damaged: download it again") from None
        if strays:
            raise ValueError(f"{folder / INDEX} names {strays[0]!r}: only files in the same folder are read")
        paths = [folder / name for name in names]
    else:
        paths = [folder / SINGLE]
    for path in paths:
        if not path.is_file():
            pickles = "; weights in .bin files are pickles and are not read" if any(folder.glob("*.bin")) else ""
            raise FileNotFoundError(f"{path} is missing: give a folder with safetensors files{pickles}")
    return TensorFiles(paths, folder)


class TensorWriter:
    """Safetensors files whose layout is known, filled in any order, one tensor at a time.

    Used as a context: leaving it normally makes sure that every tensor came, and fsyncs.
    """

    def __init__(
        self, folder: Path, files: dict[str, dict[str, TensorInfo]], metadata: dict[str, dict[str, str]]
    ) -> None:
        """Writes the headers. files: file name -> its tensors; metadata: file name -> the header's texts."""
        self.infos = {name: info for tensors in files.values() for name, info in tensors.items()}
        self._places: dict[str, tuple[Path, int]] = {}
        self._paths = [folder / file for file in files]
        for file, tensors in files.items():
            header, start = _header(tensors, metadata[file])
            (folder / file).write_bytes(header)
            for name, (begin, _) in start.items():
                self._places[name] = (folder / file, len(header) + begin)

    def write(self, name: str, tensor: Tensor) -> None:
        info = self.infos[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), name
        path, start = self._places.pop(name)
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            for piece in byte_pieces(tensor):
                content = piece.numpy().data
                while content:
                    content = content[file.write(content) :]

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        assert not self._places, f"never written: {sorted(self._places)[:3]}"
        for path in self._paths:
            fsync(path)


def split_files(infos: dict[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Tensors, in order, dealt into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[dict[str, TensorInfo]] = [{}]
    room = max_bytes
    for name, info in infos.items():
        if files[-1] and info.num_bytes > room:
            files.append({})
            room = max_bytes
        files[-1][name] = info
        room -= info.num_bytes
    return files


def parse_size(text: str) -> int:
    """Bytes from a text such as "5GB" or "500MB" (powers of 1000). Raises ValueError."""
    digits = text.strip().rstrip("BKMGTbkmgt")
    unit = text.strip()[len(digits) :].upper()
    try:
        size = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"shard size {text!r}: write a number above 0 and a unit (KB, MB, GB, TB), such as 5GB")
    return size


def read_header(path: Path) -> tuple[dict, int]:
    """(entries of a safetensors header, byte at which the data starts). Raises ValueError for a damaged file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
        ends = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] in TORCH_DTYPES:
                width = TORCH_DTYPES[entry["dtype"]].itemsize
                assert begin >= 0 and end - begin == math.prod(entry["shape"]) * width
            ends.append(end)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"{path} is damaged: its safetensors header cannot be read") from None
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        raise ValueError(f"{path} is {'truncated' if size < needed else 'too long'}: {size} bytes, should be {needed}")
    return header, 8 + length


def _header(tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(header bytes, name -> (begin, end) in the data). Widest elements first keeps every tensor aligned."""
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        spans[name] = (end, end + info.num_bytes)
        end += info.num_bytes
    entries = {
        name: {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": list(span),
        }
        for name, span in spans.items()
    }
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, spans


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def byte_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's bytes in row-major order, uint8, a few MB at a time: a transposed view is never copied whole."""
    rows = tensor if tensor.dim() else tensor[None]
    if not rows.numel():
        return
    for part in rows.split(max(1, PIECE * rows.shape[0] // rows.nbytes)):
        yield as_bytes(part)


def _wide(data: Tensor) -> Tensor:
    """Bytes as int64 where their number allows: compared 4 times faster."""
    return data if data.numel() % 8 or data.storage_offset() % 8 else data.view(torch.int64)


def _read_into(piece: Piece, out: Tensor) -> None:
    """Fill the contiguous `out` from the piece's bytes."""
    _read_bytes(piece.path, piece.start, out.reshape(-1).view(torch.uint8))


def _read_bytes(path: Path, start: int, out: Tensor) -> None:
    buffer = out.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise ValueError(f"{path} is truncated")
            buffer = buffer[count:]

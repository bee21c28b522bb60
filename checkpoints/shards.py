"""Tensors to and from safetensors shards.

The files are those of DCP's `HuggingFaceStorageWriter(save_distributed=True)`: safetensors with each piece's offset
in the header, so DCP's own `HuggingFaceStorageReader` reads them and no metadata file is needed. Reading goes through
it: it finds the pieces that a rank must read for its own layout.

Writing is ours: DCP's serialises a rank's whole shard in memory before the first byte goes out. Here each tensor goes
straight from its memory to the file, and the checksum is taken on the way.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints.manifest import PIECE, FileEntry, write_all
from checkpoints.pieces import Piece

# https://github.com/huggingface/safetensors: names of the element types in a file's header
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def write_shard(path: Path, pieces: list[Piece], contents: Iterable[Tensor]) -> FileEntry:
    """Writes and fsyncs one safetensors file of `pieces`; `contents` are their values in the same order, in any
    number of tensors on any device.
    """
    header = _header(pieces)
    size, crc = len(header), zlib.crc32(header)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(handle, header)
        for tensor in contents:
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), PIECE):
                piece = content[start : start + PIECE]
                crc = zlib.crc32(piece, crc)
                write_all(handle, piece)
            size += len(content)
        os.fsync(handle)
    finally:
        os.close(handle)
    return FileEntry(size, f"{crc:08x}")


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` (plain or DTensor) in place from what any number of ranks wrote into `folder`.

    Not collective: these are the steps of `dcp.load` without its exchange of plans. A rank reads its own
    pieces and needs nobody's help, so no failure can leave another rank waiting.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    in_file_order = dict(sorted(tensors.items()))  # lets the kernel read ahead: twice as fast from a cold cache
    planner.set_up_planner(in_file_order, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(pieces: list[Piece]) -> bytes:
    entries: dict[str, object] = {}
    assert len({piece.name for piece in pieces}) == len(pieces), "a rank holds one piece of a tensor"
    offsets = {piece.name: {"saved_offsets": list(piece.offsets)} for piece in pieces}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_bytes
        entries[piece.name] = {
            "dtype": DTYPES[piece.torch_dtype], "shape": list(piece.sizes), "data_offsets": [start, end],
        }  # fmt: skip
    about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

"""Tensors to and from safetensors shards, planned by torch.distributed.checkpoint (DCP).

DCP decides which rank writes which piece of which tensor, and which pieces a rank must read for its own
layout. The files are those of `HuggingFaceStorageWriter(save_distributed=True)`: safetensors with each
piece's offset in the header, so DCP's own `HuggingFaceStorageReader` reads them and no metadata file is
needed.

Only the writing of the bytes is ours: DCP's serialises a rank's whole shard in memory before the first byte
goes out. Here each tensor goes straight from its memory to the file, and the checksum is taken on the way.
"""

import json
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoints.collective import KINDS, CheckpointError, explain
from checkpoints.manifest import PIECE, FileEntry, TensorEntry

# https://github.com/huggingface/safetensors: names of the element types in a file's header
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes this rank's pieces into `folder/rank-NNNNN.safetensors`, or no file where it has none."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(path=str(folder), save_distributed=True)
        self.file = folder / f"rank-{rank:05d}.safetensors"
        self.entry: FileEntry | None = None
        self.tensors: dict[str, TensorEntry] = {}  # filled on the coordinator only

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        pieces = [item for item in plan.items if not _is_padding(item)]
        # Widest elements first keeps every tensor aligned to its element size, as safetensors asks.
        pieces.sort(key=lambda item: (-_properties(item).dtype.itemsize, item.index.fqn))
        if pieces:
            self.entry = self._write(pieces, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, pieces: list[WriteItem], planner: SavePlanner) -> FileEntry:
        header = _header(pieces)
        size, crc = len(header), zlib.crc32(header)
        with self.file.open("wb", buffering=PIECE) as file:
            file.write(header)
            for item in pieces:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                if tensor.shape != _sizes(item):
                    raise CheckpointError(
                        f"'{item.index.fqn}' has local shape {list(tensor.shape)}, but its placements imply "
                        f"{list(_sizes(item))}: shard it evenly"
                    )
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(content), PIECE):
                    piece = content[start : start + PIECE]
                    crc = zlib.crc32(piece, crc)
                    file.write(piece)
                size += len(content)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(size, f"{crc:08x}")

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.tensors[name] = TensorEntry(list(entry.size), dtype_name(entry.properties.dtype))


def write_shards(
    folder: Path, tensors: dict[str, Tensor], rank: int, group: dist.ProcessGroup | None
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """Collective. Writes `tensors` (plain, equal on all ranks that hold the name, or DTensor) into `folder`.

    Returns this rank's files by name, and, on rank 0, all tensors. Fails on every rank where one fails.
    """
    writer = ShardWriter(folder, rank)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as failure:
        failed_rank, (error, _) = min(failure.failures.items())
        kind, text = explain(error)
        raise KINDS[kind](text if group is None else f"{text} (rank {failed_rank})") from failure
    files = {} if writer.entry is None else {f"{folder.name}/{writer.file.name}": writer.entry}
    return files, writer.tensors


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


def _header(pieces: list[WriteItem]) -> bytes:
    entries: dict[str, object] = {}
    assert len({item.index.fqn for item in pieces}) == len(pieces), "a rank holds one piece of a tensor"
    offsets = {item.index.fqn: {"saved_offsets": list(_offsets(item))} for item in pieces}
    end = 0
    for item in pieces:
        dtype = _properties(item).dtype
        start, end = end, end + math.prod(_sizes(item)) * dtype.itemsize
        entries[item.index.fqn] = {
            "dtype": DTYPES[dtype], "shape": list(_sizes(item)), "data_offsets": [start, end],
        }  # fmt: skip
    about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _properties(item: WriteItem):
    assert item.tensor_data is not None
    return item.tensor_data.properties


def _sizes(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes


def _offsets(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.offsets


def _is_padding(item: WriteItem) -> bool:
    """An empty piece at the end of an unevenly sharded tensor; a tensor that is empty as a whole is kept."""
    return math.prod(_sizes(item)) == 0 and any(_offsets(item))

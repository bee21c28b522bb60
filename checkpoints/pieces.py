"""Which rank writes which piece of which tensor.

DCP (torch.distributed.checkpoint) says which pieces a rank holds; here each piece that several hold goes to one of
them, so that what is replicated is written once and by all ranks together. Ranks exchange JSON.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.collective import Ranks
from checkpoints.manifest import PARTS, TensorEntry

Contents = dict[str, dict[str, Tensor]]  # part -> name -> tensor


@dataclass(frozen=True)
class Piece:
    """The box of a tensor that a rank holds."""

    name: str
    dtype: str  # as torch prints it, without "torch."
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Plan:
    pieces: dict[str, list[Piece]]  # part -> what this rank writes, in the order of its file
    tensors: dict[str, dict[str, TensorEntry]]  # part -> all tensors of all ranks


def make_plan(contents: Contents, ranks: Ranks) -> Plan:
    """Collective. Raises ValueError, on every rank, where the ranks' pieces do not make up whole tensors."""
    by_rank = ranks.together(lambda: {part: [_encode(p) for p in _held(contents[part])] for part in PARTS})
    pieces, tensors = {}, {}
    for part in PARTS:
        held = [[_decode(entry) for entry in reply[part]] for reply in by_rank]
        tensors[part] = _whole(held, part)
        # Widest elements first keeps every tensor aligned to its element size, as safetensors asks.
        mine = _share_out(held)[ranks.rank]
        pieces[part] = sorted(mine, key=lambda piece: (-piece.torch_dtype.itemsize, piece.name))
    return Plan(pieces, tensors)


def signature(contents: Contents) -> Any:
    """Equal for contents that have the same plan."""
    return tuple(
        (part, name, tensor.dtype, tensor.shape, _layout(tensor))
        for part in PARTS
        for name, tensor in contents[part].items()
    )


def _layout(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def local_part(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _held(tensors: dict[str, Tensor]) -> list[Piece]:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    pieces = []
    for item in planner.create_local_plan().items:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        sizes, offsets = tuple(data.chunk.sizes), tuple(data.chunk.offsets)
        local = local_part(tensors[name])
        if local.shape != data.chunk.sizes:
            raise ValueError(
                f"'{name}' has local shape {list(local.shape)}, but its placements imply {list(sizes)}: shard it evenly"
            )
        padding = not math.prod(sizes) and any(offsets)  # past the end of a tensor that the ranks do not divide
        if not padding:
            dtype = str(local.dtype).removeprefix("torch.")
            pieces.append(Piece(name, dtype, tuple(tensors[name].shape), offsets, sizes))
    return pieces


def _whole(held: list[list[Piece]], part: str) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    boxes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for piece in (piece for pieces in held for piece in pieces):
        entry = tensors.setdefault(piece.name, TensorEntry(list(piece.shape), piece.dtype))
        known = boxes.setdefault(piece.name, {}).setdefault(piece.offsets, piece.sizes)
        if entry != TensorEntry(list(piece.shape), piece.dtype) or known != piece.sizes:
            raise ValueError(f"{part} tensor '{piece.name}' differs between ranks in shape, type or layout")
    for name, entry in tensors.items():
        found = sum(math.prod(sizes) for sizes in boxes[name].values())
        if found != math.prod(entry.shape):
            raise ValueError(
                f"{part} tensor '{name}' has {math.prod(entry.shape)} elements, but the ranks hold {found} of it"
            )
    return tensors


def _share_out(held: list[list[Piece]]) -> list[list[Piece]]:
    """Each piece to that of its holders which has the fewest bytes so far."""
    holders: dict[Piece, list[int]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            holders.setdefault(piece, []).append(rank)
    shares: list[list[Piece]] = [[] for _ in held]
    loads = [0] * len(held)
    for piece, owners in holders.items():
        owner = min(owners, key=lambda rank: loads[rank])
        loads[owner] += max(piece.num_bytes, 1)
        shares[owner].append(piece)
    return shares


def _encode(piece: Piece) -> list[Any]:
    return [piece.name, piece.dtype, piece.shape, piece.offsets, piece.sizes]


def _decode(entry: list[Any]) -> Piece:
    name, dtype, *boxes = entry
    return Piece(name, dtype, *(tuple(box) for box in boxes))

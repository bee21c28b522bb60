"""What this process is doing: its collectives, from torch's flight recorder, and where its threads stand."""

import io
import os
import pickle
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch._C
import torch.distributed as dist

from pretrain.heartbeat import waits_for_ranks

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / name}{os.sep}" for name in ("launch", "pretrain", "parallel", "data_pipeline", "checkpoints"))
READERS = tuple(f"{ROOT / name}{os.sep}" for name in ("data_pipeline", "checkpoints"))
KEPT = 2000  # collectives that the recorder remembers
TOLD = 50  # of which so many are reported
# As torch calls the elements of a tensor, where that is not lower case of what its users call them.
DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "Long": "int64", "Int": "int32", "Byte": "uint8"}
RECORDERS = ("_dump_fr_trace", "_dump_nccl_trace")  # of gloo, of NCCL


def record_collectives() -> None:
    """Turn the flight recorder on: costs a few microseconds a collective. Before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(KEPT))


class _Plain(pickle.Unpickler):
    """torch hands its record over as a pickle, from this very process; it holds numbers, text and lists alone."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"the flight recorder's dump holds {module}.{name}")


def collectives() -> list[dict[str, Any]]:
    """The newest collectives, oldest first: "op", "backend", "number" within its group and backend, "group", "ranks" of
    the group, "shape", "dtype", "p2p" (a send or receive), "open" (called, not ended), "started" (seen to run on the
    device, which NCCL tells where TORCH_NCCL_ENABLE_TIMING=1), "where" it was called. [] without torch's record.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    entries = []
    for name in RECORDERS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += _Plain(io.BytesIO(dump(True, True, False))).load().get("entries", [])
    found = describe(entries, _groups())
    # All that are open, the last of each group, which tells how far this rank came, and the last ones.
    lasts = {(each["backend"], each["group"]): index for index, each in enumerate(found)}.values()
    told = {*lasts, *range(len(found) - TOLD, len(found))}
    return [each for index, each in enumerate(found) if each["open"] or index in told]


def describe(entries: list[dict[str, Any]], members: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Entries of torch's record as `collectives` tells them, by the time of the call. members: the ranks of groups."""
    # NCCL records the parts of what goes out as one without their state: they are as far as the whole.
    wholes = {_place(entry): entry for entry in entries if str(entry["profiling_name"]).endswith("coalesced")}
    ordered = sorted(entries, key=lambda entry: entry["time_created_ns"])
    return [_collective(entry, wholes.get(_place(entry), entry), members) for entry in ordered]


def _place(entry: dict[str, Any]) -> tuple[str, str, int, int]:
    backend = str(entry["profiling_name"]).partition(":")[0]
    return backend, str(entry["process_group"][0]), entry["collective_seq_id"], entry["p2p_seq_id"]


def _groups() -> dict[str, list[int]]:
    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks.get(group, {})) for group, name in world.pg_names.items()}


def _collective(entry: dict[str, Any], whole: dict[str, Any], members: dict[str, list[int]]) -> dict[str, Any]:
    group = str(entry["process_group"][0])
    shapes, types = entry.get("input_sizes") or [[]], entry.get("input_dtypes") or [""]
    frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames") or []]
    backend, _, op = str(entry["profiling_name"]).partition(":")
    p2p = bool(entry.get("is_p2p"))
    return {
        "op": op,
        "backend": backend,
        "number": entry["p2p_seq_id" if p2p else "collective_seq_id"],
        "group": group,
        "ranks": members.get(group, []),
        "shape": list(shapes[0]),
        "dtype": DTYPES.get(types[0], types[0].lower()),
        "p2p": p2p,
        "open": not whole.get("retired") and whole.get("state") != "completed",
        "started": whole.get("state") == "started",
        "where": _ours(frames),
    }


def threads(main: int) -> dict[str, Any]:
    """Where the threads of this process stand: "where" the main one is, whether it "waits" for other ranks, what file
    or shard a thread is "reading" or writing, and "others": by name.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = frames.pop(main, None)
    frames.pop(threading.get_ident(), None)
    # The loader's thread counts only while the main one waits for it.
    files = [file for frame in (own, *frames.values()) if (file := _file_of(frame)) is not None]
    return {
        "where": _ours(_walk(own)),
        "waits": waits_for_ranks(own),
        "reading": files[0] if files else None,
        "others": {names.get(ident, str(ident)): _ours(_walk(frame)) for ident, frame in frames.items()},
    }


def _walk(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """(file, line, function) from the innermost frame out."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _ours(frames: list[tuple[str, int, str]]) -> str:
    """The innermost frame of this project, or else of anything but torch."""
    foreign = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame[0]]
    for file, line, name in [frame for frame in frames if frame[0].startswith(OURS)] + foreign:
        short = Path(file).relative_to(ROOT) if file.startswith(OURS) else Path(file)
        return f"{short}:{line} in {name}"
    return "an unknown place"


def _file_of(frame: FrameType | None) -> str | None:
    """The file or shard that a thread is at: what the innermost frame of a reader or writer has among its variables."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(READERS):
            for value in frame.f_locals.values():
                if isinstance(value, Path):
                    return str(value)
                if type(value).__name__ == "Shard":
                    return str(value.name)
        frame = frame.f_back
    return None

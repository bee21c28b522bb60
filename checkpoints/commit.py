"""How a checkpoint becomes whole: everything into `.tmp-step-N`, the manifest last, then a rename to `step-N`.

    every rank    its shards, each fsynced
    rank 0        state.json, manifest.json, fsync of the folders, rename, fsync of the folder of checkpoints

Where the same step exists, it waits as `.replaced-step-N` until the new one has its name.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.collective import CheckpointError, Ranks
from checkpoints.manifest import MANIFEST, PARTS, STATE, FileEntry, Manifest, Origin, fsync, write_durably
from checkpoints.pieces import Plan
from checkpoints.shards import write_shard

STEP_NAME = re.compile(r"(step-|\.replaced-step-)(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """What one rank gives to one checkpoint."""

    step: int
    plan: Plan
    contents: Callable[[str], Iterable[Tensor]]  # part -> the plan's pieces, in its order
    state: dict[str, Any]
    ties: dict[str, str]  # of all ranks
    lineage: tuple[Origin, ...]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def shard_name(part: str, rank: int) -> str:
    return f"{part}/rank-{rank:05d}.safetensors"


def find_steps(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, whole or not."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and (match[1] == "step-" or int(match[2]) not in found):
            found[int(match[2])] = path
    return found


def write_checkpoint(folder: Path, snapshot: Snapshot, ranks: Ranks) -> Path:
    """Collective. Raises CheckpointError on every rank when one cannot write (disk full, no permission): earlier
    checkpoints stay as they were, nothing of the new one is left.
    """
    step, final = snapshot.step, step_folder(folder, snapshot.step)
    temp = folder / f".tmp-{final.name}"

    def write() -> dict[str, Any]:
        entries = {}
        for part, pieces in snapshot.plan.pieces.items():
            if pieces:
                name = shard_name(part, ranks.rank)
                entries[name] = asdict(write_shard(temp / name, pieces, snapshot.contents(part)))
        return entries

    try:
        ranks.on_first(lambda: _make_temp(folder, temp))
        written = ranks.together(write)
        files = {name: FileEntry(**entry) for entries in written for name, entry in entries.items()}
        ranks.on_first(lambda: _commit(temp, final, snapshot, files))
    except (OSError, ValueError) as error:
        if ranks.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
        raise not_saved(folder, step, error) from error
    return final


def not_saved(folder: Path, step: int, error: Exception) -> CheckpointError:
    shared = CheckpointError(f"step {step} was not saved in {folder} (earlier checkpoints are untouched): {error}")
    shared.on_all_ranks = True  # type: ignore[attr-defined]
    return shared


def make_folder(folder: Path) -> None:
    """Makes the folder of a run's checkpoints, where there is none, so that it survives a power cut."""
    if not folder.exists():
        folder.mkdir(parents=True)
        fsync(folder.parent)


def _make_temp(folder: Path, temp: Path) -> None:
    make_folder(folder)
    _clear_stale(folder)
    for part in PARTS:
        (temp / part).mkdir(parents=True)


def _clear_stale(folder: Path) -> None:
    """Removes what a killed save left, and brings back what a killed replacement had set aside."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)
    for path in folder.glob(".replaced-step-*"):
        final = folder / path.name.removeprefix(".replaced-")
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def _commit(temp: Path, final: Path, snapshot: Snapshot, files: dict[str, FileEntry]) -> None:
    files[STATE] = write_durably(temp / STATE, json.dumps(snapshot.state, indent=1).encode())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(snapshot.step, created, snapshot.plan.tensors, snapshot.ties, files, snapshot.lineage)
    if unseen := manifest.size_problems(temp):
        raise CheckpointError(f"{unseen[0]}; all ranks must write to one shared file system")
    write_durably(temp / MANIFEST, manifest.encode())
    put_in_place(temp, final)


def put_in_place(temp: Path, final: Path) -> None:
    """A whole folder, but for the fsync of its folders, becomes the checkpoint of its step."""
    for folder in (*(temp / part for part in PARTS), temp):
        fsync(folder)
    aside = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(aside)
    temp.rename(final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)  # the next save does what is left

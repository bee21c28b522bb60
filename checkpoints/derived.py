"""Checkpoints that one process derives from something else (imports, surgery), a tensor at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints.collective import CheckpointError, explain
from checkpoints.manifest import (
    MANIFEST,
    PARTS,
    STATE,
    FileEntry,
    Manifest,
    Origin,
    TensorEntry,
    checksum,
    fsync,
    write_durably,
)
from checkpoints.shards import dtype_name
from checkpoints.tensors import TensorInfo, TensorWriter, parse_size, split_files

FILE_SIZE = "50GB"


@contextmanager
def new_checkpoint(
    checkpoints: Path,
    infos: dict[str, TensorInfo],
    ties: dict[str, str],
    state: dict[str, Any] | None = None,
    lineage: tuple[Origin, ...] = (),
    *,
    step: int = 0,
    optimizer: Path | None = None,
) -> Iterator[TensorWriter]:
    """The writer of the model's tensors for a checkpoint of `step` in the folder `checkpoints`.

    ties: other name -> the name it is stored under. state: what `state.json` says beside the step. optimizer: the
    checkpoint whose optimizer state is copied, file by file; None: the new one has none. Leaving the context makes
    the checkpoint whole; an error leaves nothing behind.
    """
    parts = split_files(infos, parse_size(FILE_SIZE))
    layout = {f"rank-{index:05d}.safetensors": part for index, part in enumerate(parts)}
    with new_folder(checkpoints / f"step-{step:08d}") as temp:
        for name in PARTS:
            (temp / name).mkdir()
        texts = {file: _dcp_metadata(part) for file, part in layout.items()}
        with TensorWriter(temp / "model", layout, texts) as writer:
            yield writer
        moments = {} if optimizer is None else _copy_optimizer(optimizer, temp)
        files = sorted(path.relative_to(temp).as_posix() for path in temp.glob("*/*.safetensors"))
        entries = {name: FileEntry((temp / name).stat().st_size, checksum(temp / name)) for name in files}
        full_state = {"ranks": [None], **(state or {}), "step": step}
        entries[STATE] = write_durably(temp / STATE, json.dumps(full_state, indent=1).encode())
        tensors = {name: TensorEntry(list(info.shape), dtype_name(info.dtype)) for name, info in infos.items()}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(step, created, {"model": tensors, "optimizer": moments}, ties, entries, lineage)
        write_durably(temp / MANIFEST, manifest.encode())
        for name in PARTS:
            fsync(temp / name)


def _copy_optimizer(source: Path, temp: Path) -> dict[str, TensorEntry]:
    """Copies the files of a checkpoint's optimizer state; returns what tensors they hold."""
    manifest = Manifest.read(source)
    for name in manifest.files:
        if name.startswith("optimizer/"):
            shutil.copyfile(source / name, temp / name)
            fsync(temp / name)
    return manifest.tensors["optimizer"]


def _dcp_metadata(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """The header texts of a file that holds whole tensors, for `torch.distributed.checkpoint`."""
    offsets = {name: {"saved_offsets": [0] * len(info.shape)} for name, info in tensors.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that gets the name `final` once its content is whole, and is gone if anything fails before.

    Raises ValueError where `final` exists and is not empty, CheckpointError for what the system refuses.
    """
    final = final.absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists and is not empty: give a new folder")
    temp = final.parent / f".tmp-{final.name}"
    shutil.rmtree(temp, ignore_errors=True)  # left by a killed process
    temp.mkdir(parents=True)
    try:
        yield temp
        for path in temp.iterdir():
            if path.is_file():
                fsync(path)
        fsync(temp)
        temp.rename(final)
        fsync(final.parent)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{final} was not written: {explain(error)[1]}") from error
        raise

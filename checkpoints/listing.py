"""Which checkpoints a folder has, and what is wrong with them."""

import logging
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from checkpoints.collective import Ranks
from checkpoints.commit import find_steps
from checkpoints.manifest import MANIFEST, Manifest, Origin, Progress, checksum
from checkpoints.retention import find_step, is_pinned

Problems = list[str]  # one line each

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    step: int
    path: Path
    bytes: int  # of all files but the manifest; 0 where there is no sound manifest
    created: str  # UTC, ISO 8601; empty where there is no sound manifest
    problem: str | None  # the first reason why it is not whole, None if it is; tensors are not read for this
    lineage: tuple[Origin, ...] = ()  # what it was derived from, oldest first
    pinned: bool = False


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """All checkpoints, whole or not, by ascending step. Looks at sizes and states; `verify_checkpoint` reads it all."""
    infos = []
    for step, path in sorted(find_steps(folder).items()):
        pinned = is_pinned(folder, step)
        try:
            manifest = Manifest.read(path)
            problem = next(iter(manifest.quick_problems(path)), None)
        except (OSError, ValueError) as error:
            infos.append(CheckpointInfo(step, path, 0, "", str(error), pinned=pinned))
        else:
            facts = manifest.num_bytes, manifest.created, problem, manifest.lineage, pinned
            infos.append(CheckpointInfo(step, path, *facts))
    return infos


def newest_whole(folder: Path) -> int | None:
    """Step of the newest checkpoint whose files are all there with the right sizes and whose state is sound.

    Broken newer ones are named in a warning.
    """
    for info in reversed(list_checkpoints(folder)):
        if info.problem is None:
            return info.step
        log.warning("skipping a broken checkpoint: %s", info.problem)
    return None


def newest_sound(folder: Path, ranks: Ranks) -> int | None:
    """Collective. As `newest_whole`, but contents are read and compared too, each file by one of the ranks."""
    infos = ranks.on_first(lambda: [[info.step, str(info.path), info.problem] for info in list_checkpoints(folder)])
    for step, path, problem in reversed(infos):
        if problem is None:
            found = ranks.together(partial(_damaged, Path(path), ranks.rank, ranks.size))
            problem = next(chain.from_iterable(found), None)
        if problem is None:
            return int(step)
        if ranks.rank == 0:
            log.warning("skipping a broken checkpoint: %s", problem)
    return None


def _damaged(path: Path, rank: int, size: int) -> Problems:
    files = Manifest.read(path).files
    mine = sorted(files)[rank::size]
    return [f"{path / name} is damaged" for name in mine if checksum(path / name) != files[name].crc32]


def verify_checkpoint(folder: Path, step: int, progress: Progress | None = None) -> Problems:
    """Every problem of one checkpoint: changed bits, missing, truncated and foreign files. Reads it all.

    `progress` is called with the number of bytes just read, of `CheckpointInfo.bytes` in all. Raises
    FileNotFoundError where there is no such checkpoint.
    """
    path = find_step(folder, step)
    try:
        manifest = Manifest.read(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    wrong_step = [] if manifest.step == step else [f"{path / MANIFEST} is of step {manifest.step}"]
    return wrong_step + manifest.size_problems(path) + manifest.content_problems(path, progress)

"""Sharded, atomic, verified checkpoints: `runs/<name>/checkpoints/step-NNNNNNNN/`.

    save:  .tmp-step-NNNNNNNN/  <- every rank's shards, state.json, then manifest.json, each fsynced
           rename to step-NNNNNNNN/, fsync of the folder, and only then is anything older pruned

A checkpoint is whole or absent, whenever the run is killed. Any number of ranks in any layout loads it.
"""

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.collective import CheckpointError, Ranks
from checkpoints.fit import check_json, check_tensors, misfits, tie_targets
from checkpoints.manifest import (
    MANIFEST,
    PARTS,
    STATE,
    FileEntry,
    Manifest,
    Origin,
    Progress,
    TensorEntry,
    checksum,
    fsync,
    write_durably,
)
from checkpoints.shards import read_shards, write_shards

__all__ = ["CheckpointError", "CheckpointInfo", "CheckpointStore"]

Problems = list[str]  # one line each

log = logging.getLogger(__name__)

# While a checkpoint is replaced by another of the same step, the old one waits under the second name.
STEP_NAME = re.compile(r"(step-|\.replaced-step-)(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    step: int
    path: Path
    bytes: int  # of all files but the manifest; 0 where there is no sound manifest
    created: str  # UTC, ISO 8601; empty where there is no sound manifest
    problem: str | None  # the first reason why it is not whole, None if it is; contents are not read for this
    lineage: tuple[Origin, ...] = ()  # what it was derived from, oldest first


class CheckpointStore:
    """The checkpoints of one run, in `folder` (`runs/<name>/checkpoints`).

    keep: how many of the newest whole ones stay. keep_every: those whose step is a multiple of it stay too.

    `save` and `load` are collective: every rank calls them; where one fails, all raise the same one-line
    error (CheckpointError, which is a ValueError, or FileNotFoundError). The rest only looks at files.
    """

    def __init__(self, folder: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep = {keep}: at least 1 checkpoint must be kept")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"checkpoint.keep_every = {keep_every}: must be at least 1 step, or left out")
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self._ranks: Ranks | None = None
        self._lineage: tuple[Origin, ...] = ()  # of what was loaded: what is trained on from it keeps it

    def save(
        self,
        step: int,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        *,
        ties: dict[str, str] | None = None,
        rank_state: Any = None,
    ) -> Path:
        """Collective. Writes the checkpoint of `step`, replacing any of the same step; returns its folder.

        model, optimizer: flat name -> DTensor, or plain tensor that is equal on all ranks that hold the name.
            A rank may hold any subset of the names (pipeline stages).
        state: JSON; rank 0's is kept, with "step" and "ranks" added. rank_state: JSON of this rank, kept as
            `state["ranks"][rank]`.
        ties: model name -> name of the model tensor that it is; stored once, under the latter.

        Raises CheckpointError on every rank when one cannot write (disk full, no permission): earlier
        checkpoints stay as they were, nothing of the new one is left.
        """
        ranks = self._join()
        temp, final = self.folder / f".tmp-step-{step:08d}", self.folder / f"step-{step:08d}"
        ties = ties or {}
        model = {name: tensor for name, tensor in model.items() if name not in ties}

        def prepare() -> dict[str, Any]:
            check_tensors(model, optimizer)
            check_json(state, "state")
            check_json(rank_state, "rank_state")
            if "ranks" in state or state.get("step", step) != step:
                raise ValueError("state must not have the keys 'step' and 'ranks': the store writes them")
            return {"step": step, "ties": ties, "rank_state": rank_state}

        try:
            replies = ranks.together(prepare)
            if len(steps := {reply["step"] for reply in replies}) > 1:
                raise RuntimeError(f"ranks save different steps: {sorted(steps)}")
            ranks.on_first(lambda: self._make_temp(temp))
            files: dict[str, FileEntry] = {}
            tensors: dict[str, dict[str, TensorEntry]] = {}
            for part, content in zip(PARTS, (model, optimizer), strict=True):
                written, tensors[part] = write_shards(temp / part, content, ranks.rank, ranks.group)
                files |= written
            written_by_rank = ranks.gather({name: asdict(entry) for name, entry in files.items()})
            full_state = {**state, "step": step, "ranks": [reply["rank_state"] for reply in replies]}

            def commit() -> None:
                entries = {name: FileEntry(**entry) for each in written_by_rank for name, entry in each.items()}
                entries[STATE] = write_durably(temp / STATE, json.dumps(full_state, indent=1).encode())
                tied = tie_targets([reply["ties"] for reply in replies], tensors["model"])
                created = datetime.now(UTC).isoformat(timespec="seconds")
                self._commit(temp, final, Manifest(step, created, tensors, tied, entries, self._lineage))

            ranks.on_first(commit)
        except (OSError, ValueError) as error:
            if ranks.rank == 0:
                shutil.rmtree(temp, ignore_errors=True)
            raise CheckpointError(
                f"step {step} was not saved in {self.folder} (earlier checkpoints are untouched): {error}"
            ) from error
        if ranks.rank == 0:
            self._prune(just_saved=step)
        return final

    def load(
        self,
        step_or_path: int | Path | None,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Collective. Fills the tensors in place, returns the state; None: of the newest whole checkpoint.

        The tensors are plain or DTensor in any layout, whichever was saved; the extra memory is that of one
        saved piece. All ranks together must name every tensor of the checkpoint (of the model alone where
        `optimizer` is None). Floating-point types may differ and are converted. A tied name is filled from
        what it is tied to. `state["ranks"]` lists what each rank of the saving run gave as `rank_state`.

        Raises FileNotFoundError (no such checkpoint, file missing) or CheckpointError (damaged, or of another
        architecture: names the tensors), on every rank and before any tensor is changed.
        """
        ranks = self._join()
        path = Path(ranks.on_first(lambda: str(self._open(step_or_path))))
        targets = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
        manifest: Manifest = ranks.everywhere(lambda: Manifest.read(path))
        problem = misfits(manifest, targets, ranks)
        if problem:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run: {problem}; use the recipe that it was trained with"
            )

        def read() -> None:
            for part, tensors in targets.items():
                ties = manifest.ties if part == "model" else {}
                read_shards(path / part, {name: t for name, t in tensors.items() if name not in ties})
                read_shards(path / part, {ties[name]: t for name, t in tensors.items() if name in ties})

        ranks.together(read)
        self._lineage = manifest.lineage
        state: dict[str, Any] = ranks.everywhere(lambda: json.loads((path / STATE).read_bytes()))
        return state

    def newest_whole(self) -> int | None:
        """Step of the newest checkpoint whose files are all there with the right sizes.

        Broken newer ones are named in a warning. `load(None, ...)` makes all ranks agree on what rank 0
        finds.
        """
        for info in reversed(self.list()):
            if info.problem is None:
                return info.step
            log.warning("skipping a broken checkpoint: %s", info.problem)
        return None

    def list(self) -> list[CheckpointInfo]:
        """All checkpoints, whole or not, by ascending step. Looks at sizes; `verify` reads the contents."""
        infos = []
        for step, path in sorted(self._scan().items()):
            try:
                manifest = Manifest.read(path)
            except (OSError, ValueError) as error:
                infos.append(CheckpointInfo(step, path, 0, "", str(error)))
            else:
                problem = next(iter(manifest.size_problems(path)), None)
                infos.append(
                    CheckpointInfo(step, path, manifest.num_bytes, manifest.created, problem, manifest.lineage)
                )
        return infos

    def verify(self, step: int, progress: Progress | None = None) -> Problems:
        """Every problem of one checkpoint: changed bits, missing, truncated and foreign files. Reads it all.

        `progress` is called with the number of bytes just read, of `CheckpointInfo.bytes` in all. Raises
        FileNotFoundError where there is no such checkpoint.
        """
        path = self._find(step)
        try:
            manifest = Manifest.read(path)
        except (OSError, ValueError) as error:
            return [str(error)]
        wrong_step = [] if manifest.step == step else [f"{path / MANIFEST} is of step {manifest.step}"]
        return wrong_step + manifest.size_problems(path) + manifest.content_problems(path, progress)

    def _join(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks()
        return self._ranks

    def _scan(self) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = STEP_NAME.fullmatch(path.name)
            if match and (match[1] == "step-" or int(match[2]) not in found):
                found[int(match[2])] = path
        return found

    def _find(self, step: int) -> Path:
        found = self._scan()
        if step not in found:
            there = f"it has steps {', '.join(map(str, sorted(found)))}" if found else "it has no checkpoint"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}: {there}")
        return found[step]

    def _open(self, step_or_path: int | Path | None) -> Path:
        """The folder of a checkpoint whose manifest, sizes and state have been checked."""
        if step_or_path is None and (step_or_path := self.newest_whole()) is None:
            raise FileNotFoundError(f"no whole checkpoint in {self.folder}")
        path = self._find(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)
        manifest = Manifest.read(path)
        problems = manifest.size_problems(path)
        if not problems and checksum(path / STATE) != manifest.files[STATE].crc32:
            problems = [f"{path / STATE} is damaged"]
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise CheckpointError(f"checkpoint is not whole: {problems[0]}{more}; load another step")
        return path

    def _make_temp(self, temp: Path) -> None:
        self._clear_stale()
        for part in PARTS:
            (temp / part).mkdir(parents=True)

    def _clear_stale(self) -> None:
        """Removes what a killed save left, and brings back what a killed replacement had set aside."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path)
        for path in self.folder.glob(".replaced-step-*"):
            final = self.folder / path.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)

    def _commit(self, temp: Path, final: Path, manifest: Manifest) -> None:
        if unseen := manifest.size_problems(temp):
            raise CheckpointError(f"{unseen[0]}; all ranks must write to one shared file system")
        write_durably(temp / MANIFEST, manifest.encode())
        for folder in (*(temp / part for part in PARTS), temp):
            fsync(folder)
        aside = self.folder / f".replaced-{final.name}"
        if final.exists():
            final.rename(aside)
        temp.rename(final)
        fsync(self.folder)
        if aside.exists():
            shutil.rmtree(aside)

    def _prune(self, just_saved: int) -> None:
        """Broken checkpoints do not count as kept, and are left for a person to look at."""
        whole = [info for info in self.list() if info.problem is None]
        for info in whole[: -self.keep]:
            if info.step == just_saved or (self.keep_every and info.step % self.keep_every == 0):
                continue
            doomed = self.folder / f".tmp-pruned-{info.path.name}"
            try:
                info.path.rename(doomed)  # so that a kill in the middle leaves no half checkpoint
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("could not prune %s: %s", info.path, error)

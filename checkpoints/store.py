"""Sharded, atomic, verified checkpoints: `runs/<name>/checkpoints/step-NNNNNNNN/`.

A checkpoint is whole or absent, whenever the run is killed. Any number of ranks in any layout loads it.

    pieces.py    which rank writes what          shards.py      the files of tensors
    commit.py    from a folder to a checkpoint   background.py  the same while training goes on
    manifest.py  what is in it, and checksums    retention.py   which ones stay
    listing.py   which ones there are            remote.py      copies of them elsewhere
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from checkpoints.background import Background, Report
from checkpoints.collective import CheckpointError, Ranks
from checkpoints.commit import Snapshot, not_saved, shard_name, write_checkpoint
from checkpoints.fit import check_state, check_tensors, misfits, tie_targets
from checkpoints.listing import (
    CheckpointInfo,
    Problems,
    list_checkpoints,
    newest_sound,
    newest_whole,
    verify_checkpoint,
)
from checkpoints.manifest import STATE, Manifest, Origin, Progress
from checkpoints.pieces import Contents, Plan, local_part, make_plan, signature
from checkpoints.remote import Remote
from checkpoints.retention import Retention, find_step, prune
from checkpoints.shards import read_shards

__all__ = ["CheckpointError", "CheckpointInfo", "CheckpointStore", "Report"]


class CheckpointStore:
    """The checkpoints of one run, in `folder` (`runs/<name>/checkpoints`); which of them stay: see `Retention`.
    remote: URL below which each is copied once it is whole, such as s3://bucket/runs/name; `fetch` brings it back.

    `save`, `prepare`, `save_async`, `finish` and `load` are collective: every rank calls them; where one fails, all
    raise the same one-line error (CheckpointError, which is a ValueError, or FileNotFoundError). The rest only looks
    at files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        remote: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._remote = Remote(remote) if remote else None
        self.retention = Retention(keep, keep_every, best, best_mode, keep_best)
        self._ranks: Ranks | None = None
        self._background: Background | None = None
        self._planned: tuple[Any, Plan] | None = None  # of the last save, with the signature of what it was made for
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
        state: JSON; rank 0's is kept, with "step" and "ranks" added. Numbers under its key "metrics" are what
            retention compares. rank_state: JSON of this rank, kept as `state["ranks"][rank]`.
        ties: model name -> name of the model tensor that it is; stored once, under the latter.

        Raises CheckpointError on every rank when one cannot write (disk full, no permission): earlier
        checkpoints stay as they were, nothing of the new one is left.
        """
        if self._background is not None:
            self._background.wait()
        contents = _stored(model, optimizer, ties or {})
        snapshot, _ = self._snapshot(step, contents, state, ties or {}, rank_state)

        def live(part: str) -> Any:
            return (local_part(contents[part][piece.name]) for piece in snapshot.plan.pieces[part])

        return self._write(replace(snapshot, contents=live), self._join())

    def prepare(
        self, model: dict[str, Tensor], optimizer: dict[str, Tensor], *, ties: dict[str, str] | None = None
    ) -> None:
        """Collective. What the first `save_async` would do otherwise: allocates the host memory that it copies to."""
        contents = _stored(model, optimizer, ties or {})
        self._stage(contents, self._plan(contents, self._join()))

    def save_async(
        self,
        step: int,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
        *,
        ties: dict[str, str] | None = None,
        rank_state: Any = None,
        skip_if_busy: bool = False,
    ) -> bool:
        """Collective. As `save`, but returns once the tensors are copied to host memory; a thread writes them.

        While an earlier save is being written on any rank it is waited for, or, with `skip_if_busy`, nothing is
        saved and False returned, on all ranks. `reports` tells how a save ended, `finish` waits for it.
        """
        contents = _stored(model, optimizer, ties or {})
        snapshot, busy = self._snapshot(step, contents, state, ties or {}, rank_state)
        if busy and skip_if_busy:
            return False
        background = self._stage(contents, snapshot.plan)
        background.wait()
        assert background.staging is not None
        background.staging.copy(contents)
        background.start(replace(snapshot, contents=background.staging.contents))
        return True

    def reports(self) -> list[Report]:
        """How the saves in the background went that have ended since the last call."""
        return [] if self._background is None else self._background.reports()

    def finish(self) -> None:
        """Collective. Waits for the save in the background. Where it failed it is tried again, here and now; raises
        CheckpointError where that fails too.
        """
        if self._background is None:
            return
        self._background.wait()
        if any(self._join().gather(self._background.failed)):
            assert self._background.last is not None
            self._write(self._background.last, self._join())
            self._background.failed = False

    def close(self) -> None:
        """Waits for the save in the background, however it ends, and frees its memory. Not collective."""
        if self._background is not None:
            self._background.close()
            self._background = None

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

    def fetch(self) -> int | None:
        """Step of the newest whole checkpoint of the remote, where that is newer than all here: it is brought here.

        Raises ValueError where the remote is another run's, CheckpointError where all there are broken, none is here.
        """
        if self._remote is None:
            return None
        self._remote.claim(self.folder)
        self._remote.carry_pins(self.folder)
        return self._remote.fetch(self.folder, after=self.newest_whole())

    def newest_whole(self) -> int | None:
        """As `listing.newest_whole`. `load(None, ...)` makes all ranks agree on what rank 0 finds."""
        return newest_whole(self.folder)

    def newest_sound(self) -> int | None:
        """Collective. As `listing.newest_sound`."""
        return newest_sound(self.folder, self._join())

    def list(self) -> list[CheckpointInfo]:
        """As `listing.list_checkpoints`."""
        return list_checkpoints(self.folder)

    def verify(self, step: int, progress: Progress | None = None) -> Problems:
        """As `listing.verify_checkpoint`."""
        return verify_checkpoint(self.folder, step, progress)

    def _join(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks()
        return self._ranks

    def _snapshot(
        self, step: int, contents: Contents, state: dict[str, Any], ties: dict[str, str], rank_state: Any
    ) -> tuple[Snapshot, bool]:
        """Collective. The checkpoint to be, without its contents; and whether any rank is still writing another."""
        ranks = self._join()

        def check() -> dict[str, Any]:
            check_tensors(contents["model"], contents["optimizer"])
            check_state(state, rank_state, step)
            busy = self._background is not None and self._background.busy
            return {"step": step, "ties": ties, "rank_state": rank_state, "busy": busy}

        try:
            replies = ranks.together(check)
            if len(steps := {reply["step"] for reply in replies}) > 1:
                raise RuntimeError(f"ranks save different steps: {sorted(steps)}")
            plan = self._plan(contents, ranks)
            all_ties = tie_targets([reply["ties"] for reply in replies], plan.tensors["model"])
        except ValueError as error:
            raise not_saved(self.folder, step, error) from error
        full_state = {**state, "step": step, "ranks": [reply["rank_state"] for reply in replies]}
        snapshot = Snapshot(step, plan, lambda part: (), full_state, all_ties, self._lineage)
        return snapshot, any(reply["busy"] for reply in replies)

    def _plan(self, contents: Contents, ranks: Ranks) -> Plan:
        """Collective. Made again only where the tensors of any rank are others than the last time."""
        mine = signature(contents)
        known = self._planned is not None and self._planned[0] == mine
        if self._planned is None or not all(ranks.gather(known)):
            self._planned = (mine, make_plan(contents, ranks))
        return self._planned[1]

    def _stage(self, contents: Contents, plan: Plan) -> Background:
        """Collective."""
        ranks = self._join()
        if self._background is None:
            self._background = Background(self._write)
        background = self._background
        stale = background.staging is None or background.staging.plan is not plan
        if any(ranks.gather(stale)):
            background.wait()
            ranks.together(lambda: background.allocate(plan, lock=_on_gpu(contents)))
        return background

    def _write(self, snapshot: Snapshot, ranks: Ranks) -> Path:
        path = write_checkpoint(self.folder, snapshot, ranks)
        if ranks.rank == 0:
            whole = [info.step for info in self.list() if info.problem is None]
            prune(self.folder, self.retention, whole, just_saved=snapshot.step)
        if self._remote is not None:
            self._copy(self._remote, path, snapshot, ranks)
        return path

    def _copy(self, remote: Remote, path: Path, snapshot: Snapshot, ranks: Ranks) -> None:
        names = [shard_name(part, ranks.rank) for part, pieces in snapshot.plan.pieces.items() if pieces]
        try:
            remote.push(path, names, ranks)
            ranks.on_first(lambda: remote.prune(self.retention, self.folder, just_saved=snapshot.step))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"step {snapshot.step} is saved in {self.folder}, but not copied: {error}") from error

    def _open(self, step_or_path: int | Path | None) -> Path:
        """The folder of a checkpoint whose manifest, sizes and state have been checked."""
        if step_or_path is None and (step_or_path := self.newest_whole()) is None:
            raise FileNotFoundError(f"no whole checkpoint in {self.folder}")
        path = find_step(self.folder, step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)
        if problems := Manifest.read(path).quick_problems(path):
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise CheckpointError(f"checkpoint is not whole: {problems[0]}{more}; load another step")
        return path


def _stored(model: dict[str, Tensor], optimizer: dict[str, Tensor], ties: dict[str, str]) -> Contents:
    return {"model": {name: tensor for name, tensor in model.items() if name not in ties}, "optimizer": optimizer}


def _on_gpu(contents: Contents) -> bool:
    return any(tensor.is_cuda for tensors in contents.values() for tensor in tensors.values())

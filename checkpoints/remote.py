"""Copies of a run's checkpoints in a store such as s3 or gs, which has no rename.

    push     the ranks' shards, state.json, and, once all of them are there with their sizes, manifest.json
    remove   manifest.json, then the rest

So a copy with a manifest is whole. A run that starts where there is none, or an older one, fetches the newest.

Beside the copies lie `run-id`, which says whose they are and is also in the run's folder of checkpoints, and an empty
`step-NNNNNNNN.pinned` for each that stays.
"""

import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from checkpoints.collective import CheckpointError, Ranks
from checkpoints.commit import find_steps, make_folder, put_in_place, step_folder
from checkpoints.manifest import MANIFEST, PARTS, STATE, Manifest, checksum, fsync, write_durably
from checkpoints.retention import (
    Retention,
    forget_unpinned,
    mark_pinned,
    numbers_of,
    pin_file,
    pinned_steps,
    unpinned_steps,
)

NAME = re.compile(r"step-(\d+)(\.pinned)?")
ASIDE = "manifest.set-aside.json"
OWNER = "run-id"

log = logging.getLogger(__name__)


class BrokenCopy(CheckpointError):
    """A copy that has a manifest, but not all that was copied. That the store cannot be reached is something else."""


class Remote:
    """The copies below `url`, any that fsspec opens. Raises ValueError where it does not, CheckpointError, in one line,
    for whatever goes wrong in talking to it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options = {"auto_mkdir": True} if fsspec.utils.get_protocol(self.url) == "file" else {}
        try:
            self._store, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"checkpoint.remote = {url!r}: {text}; pip install 'pretrain-stack[remote]'") from None
        self._root = root.rstrip("/")

    def claim(self, folder: Path) -> None:
        """From now on the copies are those of the run whose checkpoints are in `folder`, and no other's.

        A folder without checkpoints takes over what is there: so a run moves. Raises ValueError where the copies are
        another run's.
        """
        known, mark = folder / OWNER, f"{self._root}/{OWNER}"
        mine = known.read_text().strip() if known.is_file() else ""
        theirs = (self._read(mark) or b"").decode(errors="replace").strip()
        if theirs and theirs != mine and (mine or not self._same_run(folder)):
            raise ValueError(
                f"checkpoint.remote = {self.url!r} has the checkpoints of another run than the one in {folder}: "
                "choose another checkpoint.remote"
            )
        if not mine:
            mine = theirs or uuid.uuid4().hex
            make_folder(folder)
            write_durably(known, mine.encode())
            fsync(folder)
        if not theirs:
            with self._talk():
                self._store.pipe_file(mark, mine.encode())

    def push(self, path: Path, names: list[str], ranks: Ranks) -> None:
        """Collective. Copy the whole checkpoint at `path`, of whose shards this rank brings those of `names`."""
        place = f"{self._root}/{path.name}"

        def clear() -> None:
            self.claim(path.parent)
            self._remove(place)

        def bring() -> None:
            with self._talk():
                for name in names:
                    self._store.put_file(str(path / name), f"{place}/{name}")

        def seal() -> None:
            manifest = Manifest.read(path)
            with self._talk():
                self._store.put_file(str(path / STATE), f"{place}/{STATE}")
            if problems := self._problems(place, manifest):
                raise CheckpointError(f"{problems[0]} after it was written")
            with self._talk():
                self._store.pipe_file(f"{place}/{MANIFEST}", manifest.encode())

        ranks.on_first(clear)
        ranks.together(bring)
        ranks.on_first(seal)

    def steps(self) -> list[int]:
        """Of all copies, whole or not, ascending."""
        return sorted(step for step, pinned in self._names() if not pinned)

    def newest_whole(self) -> int | None:
        """Broken newer ones are named in a warning."""
        for step in reversed(self._sealed()):
            try:
                self._sound_manifest(step)
                return step
            except BrokenCopy as error:
                log.warning("skipping a broken copy of a checkpoint: %s", error)
        return None

    def fetch(self, folder: Path, after: int | None = None) -> int | None:
        """Bring the newest whole copy into the run's folder of checkpoints, if its step is beyond `after`, the newest
        whole one there; every byte is checked before it counts. Returns its step.

        Broken newer ones are named in a warning. Raises CheckpointError where there are no others, here or there.
        """
        problems = []
        for step in reversed(self._sealed()):
            if after is not None and step <= after:
                return None
            try:
                self._bring(step, folder)
                return step
            except BrokenCopy as error:
                log.warning("skipping a broken copy of a checkpoint: %s", error)
                problems.append(str(error))
        if problems and after is None:
            raise CheckpointError(
                f"{self.url} has {len(problems)} checkpoints and none is whole ({problems[0]}); restore one, or choose "
                "another checkpoint.remote to start anew"
            )
        return None

    def prune(self, retention: Retention, folder: Path, just_saved: int) -> None:
        """Copies without a manifest are what a killed process left, and go too. `folder` has the run's pins."""
        stay = retention.kept(self._sealed(), self._metrics, self.carry_pins(folder)) | {just_saved}
        for step in self.steps():
            if step not in stay and not self._has(step, ASIDE):
                self._remove(self._place(step))

    def carry_pins(self, folder: Path) -> set[int]:
        """Pin and unpin the copies as it was done in `folder` since the last time; returns the steps that are pinned,
        those included that `folder` does not have.
        """
        marked, mine = {step for step, pinned in self._names() if pinned}, pinned_steps(folder)
        for step in mine - marked:
            with self._talk():
                self._store.pipe_file(f"{self._root}/{pin_file(Path(), step)}", b"")
        gone = unpinned_steps(folder)
        for step in gone:
            self._unpin(step)
            forget_unpinned(folder, step)
        return (marked | mine) - gone

    def set_aside(self, after: int) -> list[int]:
        """Copies of later steps no longer count; nothing of them is deleted. Returns their steps."""
        newer = [step for step in self._sealed() if step > after]
        for step in sorted(newer, reverse=True):
            place = self._place(step)
            with self._talk():
                self._store.cp_file(f"{place}/{MANIFEST}", f"{place}/{ASIDE}")
                self._store.rm_file(f"{place}/{MANIFEST}")
            self._unpin(step)
        return newer

    def _same_run(self, folder: Path) -> bool:
        """Whether a folder whose run is not known is empty, or has the same checkpoints, as far as both have a step."""
        here, there = find_steps(folder), self._sealed()
        both = [(path / MANIFEST, step) for step, path in here.items() if step in there and (path / MANIFEST).is_file()]
        same = {path.read_bytes() == self._read(f"{self._place(step)}/{MANIFEST}") for path, step in both}
        return not here or same == {True}

    def _bring(self, step: int, folder: Path) -> None:
        """Raises BrokenCopy, and leaves nothing, where a byte is not as it was copied."""
        manifest, final = self._sound_manifest(step), step_folder(folder, step)
        temp = folder / f".tmp-fetched-{final.name}"
        shutil.rmtree(temp, ignore_errors=True)
        for part in PARTS:
            (temp / part).mkdir(parents=True)
        for name, entry in manifest.files.items():
            with self._talk():
                self._store.get_file(f"{self._place(step)}/{name}", str(temp / name))
            if (temp / name).stat().st_size != entry.bytes or checksum(temp / name) != entry.crc32:
                shutil.rmtree(temp)
                raise BrokenCopy(f"{self.url}/{final.name}/{name} is damaged")
            fsync(temp / name)
        write_durably(temp / MANIFEST, manifest.encode())
        if (step, True) in self._names():
            mark_pinned(folder, step)
        put_in_place(temp, final)

    def _place(self, step: int) -> str:
        return f"{self._root}/{step_folder(Path(), step).name}"

    def _names(self) -> set[tuple[int, bool]]:
        """(step, False) of every copy, (step, True) of every pin."""
        with self._talk():
            self._store.invalidate_cache()
            try:
                names = self._store.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        matches = (NAME.fullmatch(name.rstrip("/").rpartition("/")[2]) for name in names)
        return {(int(match[1]), match[2] is not None) for match in matches if match}

    def _sealed(self) -> list[int]:
        """Steps of the copies that were whole once, ascending."""
        return [step for step in self.steps() if self._has(step, MANIFEST)]

    def _sound_manifest(self, step: int) -> Manifest:
        """Raises BrokenCopy where it is damaged, or a file is missing or has another size."""
        place = self._place(step)
        raw = self._read(f"{place}/{MANIFEST}") or b""
        try:
            manifest = Manifest.parse(raw, f"{self.url}/{step_folder(Path(), step).name}/{MANIFEST}")
        except CheckpointError as error:
            raise BrokenCopy(str(error)) from None
        if problems := self._problems(place, manifest):
            raise BrokenCopy(problems[0])
        return manifest

    def _metrics(self, step: int) -> dict[str, float]:
        return numbers_of(self._read(f"{self._place(step)}/{STATE}") or b"")

    def _read(self, place: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        with self._talk():
            try:
                content: bytes = self._store.cat_file(place)
            except FileNotFoundError:
                return None
        return content

    def _has(self, step: int, name: str) -> bool:
        with self._talk():
            return bool(self._store.exists(f"{self._place(step)}/{name}"))

    def _unpin(self, step: int) -> None:
        if (step, True) in self._names():
            with self._talk():
                self._store.rm_file(f"{self._root}/{pin_file(Path(), step)}")

    def _problems(self, place: str, manifest: Manifest) -> list[str]:
        """Files that are missing or have another size."""
        with self._talk():
            self._store.invalidate_cache()
            found: dict[str, Any] = self._store.find(place, detail=True)
        sizes = {name.removeprefix(f"{place}/"): info["size"] for name, info in found.items()}
        wrong = [name for name, entry in manifest.files.items() if sizes.get(name) != entry.bytes]
        return [f"{self.url}/{place.rpartition('/')[2]}/{name} is missing or has another size" for name in wrong]

    def _remove(self, place: str) -> None:
        with self._talk():
            if self._store.exists(f"{place}/{MANIFEST}"):
                self._store.rm_file(f"{place}/{MANIFEST}")
            if self._store.exists(place):
                self._store.rm(place, recursive=True)

    @contextmanager
    def _talk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every store has kinds of its own
            text = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.url}: {text}") from error

"""Copies of a run's checkpoints in a store such as s3 or gs, which has no rename.

    push     the ranks' shards, state.json, and, once all of them are there with their sizes, manifest.json
    remove   manifest.json, then the rest

So a copy with a manifest is whole. A run that starts where there is none, or an older one, fetches the newest.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from checkpoints.collective import CheckpointError, Ranks
from checkpoints.commit import put_in_place, step_folder
from checkpoints.manifest import MANIFEST, PARTS, STATE, Manifest, checksum, fsync, write_durably
from checkpoints.retention import Retention, numbers_of

STEP_NAME = re.compile(r"step-(\d+)")
ASIDE = "manifest.set-aside.json"

log = logging.getLogger(__name__)


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

    def push(self, path: Path, names: list[str], ranks: Ranks) -> None:
        """Collective. Copy the whole checkpoint at `path`, of whose shards this rank brings those of `names`."""
        place = f"{self._root}/{path.name}"

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

        ranks.on_first(lambda: self._remove(place))
        ranks.together(bring)
        ranks.on_first(seal)

    def steps(self) -> list[int]:
        """Of all copies, whole or not, ascending."""
        with self._talk():
            self._store.invalidate_cache()
            try:
                names = self._store.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        matches = (STEP_NAME.fullmatch(name.rstrip("/").rpartition("/")[2]) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def newest_whole(self) -> int | None:
        """Broken newer ones are named in a warning."""
        for step in reversed(self.steps()):
            try:
                problems = self._problems(self._place(step), self._manifest(step))
            except (FileNotFoundError, CheckpointError) as error:
                problems = [str(error)]
            if not problems:
                return step
            log.warning("skipping a broken copy of a checkpoint: %s", problems[0])
        return None

    def fetch(self, step: int, folder: Path) -> Path:
        """Bring a copy into the run's folder of checkpoints; every byte is checked before it counts there."""
        manifest, final = self._manifest(step), step_folder(folder, step)
        temp = folder / f".tmp-fetched-{final.name}"
        shutil.rmtree(temp, ignore_errors=True)
        for part in PARTS:
            (temp / part).mkdir(parents=True)
        for name, entry in manifest.files.items():
            with self._talk():
                self._store.get_file(f"{self._place(step)}/{name}", str(temp / name))
            if (temp / name).stat().st_size != entry.bytes or checksum(temp / name) != entry.crc32:
                raise CheckpointError(f"{self.url}/{final.name}/{name} is damaged: fetch another step by hand")
            fsync(temp / name)
        write_durably(temp / MANIFEST, manifest.encode())
        put_in_place(temp, final)
        return final

    def prune(self, retention: Retention, pinned: set[int], just_saved: int) -> None:
        """Copies without a manifest are what a killed process left, and go too."""
        whole = [step for step in self.steps() if self._has_manifest(step)]
        stay = retention.kept(whole, self._metrics, pinned) | {just_saved}
        for step in self.steps():
            if step not in stay and not self._is_aside(step):
                self._remove(self._place(step))

    def set_aside(self, after: int) -> list[int]:
        """Copies of later steps no longer count; nothing of them is deleted. Returns their steps."""
        newer = [step for step in self.steps() if step > after and self._has_manifest(step)]
        for step in sorted(newer, reverse=True):
            place = self._place(step)
            with self._talk():
                self._store.cp_file(f"{place}/{MANIFEST}", f"{place}/{ASIDE}")
                self._store.rm_file(f"{place}/{MANIFEST}")
        return newer

    def _place(self, step: int) -> str:
        return f"{self._root}/{step_folder(Path(), step).name}"

    def _manifest(self, step: int) -> Manifest:
        where = f"{self.url}/{step_folder(Path(), step).name}/{MANIFEST}"
        with self._talk():
            raw = self._store.cat_file(f"{self._place(step)}/{MANIFEST}")
        return Manifest.parse(raw, where)

    def _metrics(self, step: int) -> dict[str, float]:
        with self._talk():
            return numbers_of(self._store.cat_file(f"{self._place(step)}/{STATE}"))

    def _has_manifest(self, step: int) -> bool:
        with self._talk():
            return bool(self._store.exists(f"{self._place(step)}/{MANIFEST}"))

    def _is_aside(self, step: int) -> bool:
        with self._talk():
            return bool(self._store.exists(f"{self._place(step)}/{ASIDE}"))

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
        except FileNotFoundError:
            raise
        except Exception as error:  # every store has kinds of its own
            text = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.url}: {text}") from error

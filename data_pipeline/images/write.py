"""Image-text shards, written with webdataset's own writer: from samples, or from a folder with a folder for each class.

photos/lynx/x.png            ->   train-00000.tar:   000000000.png
photos/tabby_cat/001.png                             000000000.txt    a photo of a lynx
photos/tabby_cat/002.jpg                             000000000.json   {"class": "lynx", "label": 0, ...}
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter

from data_pipeline.paths import write_atomic

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")
CLASSES = "classes.json"
KEY = re.compile(r"[\w-]+(/[\w-]+)*")


class ImageText(NamedTuple):
    """A sample: pictures as (extension without its dot, encoded bytes), and its text."""

    key: str  # letters, digits, _ and -, with / between folders
    pictures: Sequence[tuple[str, bytes]]
    text: str
    facts: Mapping[str, Any] | None = None  # for a .json beside the text


def write_image_shards(
    samples: Iterable[ImageText], folder: str | Path, *, name: str = "train", shard_samples: int = 10_000
) -> list[Path]:
    """Write ``NAME-00000.tar``, ... into ``folder``; equal samples give equal bytes. Returns the shards.

    Args:
        shard_samples: samples in a shard; the last one has the rest.

    Raises:
        ValueError: a key that cannot be one, or that comes twice; no sample; the folder has shards of this name.
    """
    folder = Path(folder)
    if shard_samples < 1:
        raise ValueError(f"shard_samples {shard_samples}: must be at least 1")
    if any(folder.glob(f"{name}-*.tar")):
        raise ValueError(f"{folder}: holds {name}-*.tar already; remove them or choose another folder or name")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    seen: set[str] = set()
    part: list[ImageText] = []
    for sample in samples:
        if not KEY.fullmatch(sample.key) or sample.key in seen:
            wrong = "comes twice" if sample.key in seen else "must be letters, digits, _ and -, with / between folders"
            raise ValueError(f"{folder}: key {sample.key!r} {wrong}")
        seen.add(sample.key)
        part.append(sample)
        if len(part) == shard_samples:
            shards.append(_write_shard(folder / f"{name}-{len(shards):05d}.tar", part))
            part = []
    if part:
        shards.append(_write_shard(folder / f"{name}-{len(shards):05d}.tar", part))
    if not shards:
        raise ValueError(f"{folder}: there is no sample to write as {name}-*.tar; give at least one")
    return shards


def _write_shard(path: Path, samples: Sequence[ImageText]) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            writer = TarWriter(file, encoder=False, mtime=0)  # no time of writing: equal samples, equal bytes
            for sample in samples:
                writer.write(_members(sample))
            writer.close()
        for stale in path.parent.glob(f"{path.name}.*idx"):  # of a shard that was here before
            stale.unlink()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def _members(sample: ImageText) -> dict[str, Any]:
    """One picture is ``KEY.png``; several are ``KEY.0.png``, ``KEY.1.png``, ..."""
    numbered = len(sample.pictures) != 1
    members: dict[str, Any] = {"__key__": sample.key, "txt": sample.text.encode()}
    for number, (extension, data) in enumerate(sample.pictures):
        if f".{extension}" not in EXTENSIONS:
            raise ValueError(f"sample {sample.key!r}: extension {extension!r}: must be one of {', '.join(EXTENSIONS)}")
        members[f"{number}.{extension}" if numbered else extension] = data
    if sample.facts is not None:
        members["json"] = json.dumps(dict(sample.facts), sort_keys=True, ensure_ascii=False).encode()
    return members


def write_image_folder(
    source: str | Path,
    folder: str | Path,
    *,
    caption: str = "a photo of a {name}",
    held_out: float = 0.0,
    shard_samples: int = 10_000,
) -> dict[str, int]:
    """Write ``SOURCE/CLASS/picture.png`` as shards, with ``classes.json``: the classes' names by label.

    Args:
        caption: text of each picture; ``{name}`` is its folder's name, with spaces for underscores.
        held_out: share of pictures that go to ``heldout-*.tar``, chosen by a hash of their path below ``source``.

    Returns:
        samples of each split.

    Raises:
        FileNotFoundError: no picture in a folder of a class. ValueError: a setting out of its range.
    """
    source, folder = Path(source), Path(folder)
    if "{name}" not in caption or not 0 <= held_out < 1:
        raise ValueError(f"caption {caption!r}, held_out {held_out}: needs {{name}} in it, and 0 <= held_out < 1")
    files = [path for path in sorted(source.glob("*/*")) if path.suffix.lower() in EXTENSIONS and path.is_file()]
    if not files:
        raise FileNotFoundError(f"{source}: no picture in a folder of a class; expected {source}/CLASS/picture.png")
    labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in files}))}
    names = [name.replace("_", " ") for name in labels]

    def sample(number: int, path: Path) -> ImageText:
        label = labels[path.parent.name]
        facts = {"label": label, "class": names[label], "file": path.relative_to(source).as_posix()}
        picture = (path.suffix.lower().removeprefix("."), path.read_bytes())
        return ImageText(f"{number:09d}", [picture], caption.replace("{name}", names[label]), facts)

    splits: dict[str, list[tuple[int, Path]]] = {"train": [], "heldout": []}
    for number, path in enumerate(files):
        splits[split_of(path.relative_to(source).as_posix(), held_out)].append((number, path))
    splits = {split: members for split, members in splits.items() if members}
    for split, members in splits.items():
        write_image_shards((sample(*member) for member in members), folder, name=split, shard_samples=shard_samples)
    write_atomic(folder / CLASSES, json.dumps(names, indent=2, ensure_ascii=False).encode() + b"\n")
    return {split: len(members) for split, members in splits.items()}


def split_of(name: str, held_out: float) -> str:
    """ "heldout" for a share ``held_out`` of all names, else "train": always the same for a name."""
    hashed = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
    return "heldout" if hashed < held_out * 2**64 else "train"
